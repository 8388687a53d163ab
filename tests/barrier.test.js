// The arithmetic of the living figure by itself; test_permuter.py compares it with PyTorch's.

"use strict";

const test = require("node:test");
const assert = require("node:assert");
const B = require("../mcnotes/lab/barrier.js");

// The same numbers each time: a linear congruence.
function random(seed) {
  let state = seed;
  return () => (state = (state * 1103515245 + 12345) % 2147483648) / 2147483648 - 0.5;
}

function smallPair(units, images = 30, classes = 3, seed = 1) {
  const draw = random(seed);
  const many = (count) => Float64Array.from({ length: count }, () => 4 * draw());
  return {
    units, images, classes,
    z1: many(units * images), z2: many(units * images),
    A1: many(units * classes), A2: many(units * classes),
    b1: [...many(classes)], b2: [...many(classes)],
    labels: Array.from({ length: images }, (_, k) => k % classes),
  };
}

const ts = [0, 0.2, 0.5, 0.9, 1];
const close = (a, b, within = 1e-9) => assert.ok(Math.abs(a - b) < within, `${a} and ${b}`);
const identity = (n) => Array.from({ length: n }, (_, i) => i);

test("a swap gives what starting from the new order gives", () => {
  const pair = smallPair(6);
  const line = new B.Line(pair, ts, identity(6));
  const expected = new B.Line(pair, ts, [4, 1, 2, 3, 0, 5]);
  const tried = line.tried(0, 4);
  line.swap(0, 4);
  assert.deepStrictEqual(line.order, expected.order);
  line.losses.forEach((loss, k) => close(loss, expected.losses[k]));
  tried.forEach((loss, k) => close(loss, expected.losses[k]));
});

test("a thousand swaps lose nothing to rounding", () => {
  const pair = smallPair(6);
  const line = new B.Line(pair, ts, identity(6));
  const draw = random(7);
  const place = () => Math.floor((draw() + 0.5) * 6);
  for (let k = 0; k < 1000; k++) line.swap(place(), place());
  const fresh = new B.Line(pair, ts, line.order);
  line.losses.forEach((loss, k) => close(loss, fresh.losses[k]));
});

test("a swap of a unit with itself changes nothing", () => {
  const line = new B.Line(smallPair(4), ts, identity(4));
  const before = [...line.losses];
  line.swap(2, 2);
  assert.deepStrictEqual(line.losses, before);
  assert.deepStrictEqual(line.tried(1, 1), before);
});

test("the ends do not depend on the order", () => {
  const pair = smallPair(5);
  const heights = [...B.orders(5)].map((order) => new B.Line(pair, ts, order).losses);
  heights.forEach((losses) => {
    close(losses[0], heights[0][0]);
    close(losses[4], heights[0][4]);
  });
});

test("the barrier is measured from the chord, and never below it", () => {
  close(B.barrier([0, 0.5, 1], [1, 3, 2]), 1.5);
  close(B.barrier([0, 0.5, 1], [1, 1.5, 2]), 0);
  close(B.barrier([0, 0.5, 1], [1, 0, 2]), 0);
});

test("the best swap is the best of all", () => {
  const pair = smallPair(5);
  const line = new B.Line(pair, ts, identity(5));
  const steps = B.bestSwap(line);
  let step;
  let count = 0;
  while (!(step = steps.next()).done) count++;
  assert.strictEqual(count, 10);
  const heights = [];
  for (let i = 0; i < 5; i++) {
    for (let k = i + 1; k < 5; k++) heights.push(B.barrier(ts, line.tried(i, k)));
  }
  const least = Math.min(...heights);
  if (step.value) close(B.barrier(ts, line.tried(...step.value)), least);
  else assert.ok(least >= line.barrier - 1e-9);
});

test("greedy steps end where no swap helps", () => {
  const line = new B.Line(smallPair(5, 30, 3, 5), ts, identity(5));
  for (let k = 0; k < 50; k++) {
    const steps = B.bestSwap(line);
    let step;
    do step = steps.next(); while (!step.done);
    if (!step.value) return;
    const before = line.barrier;
    line.swap(...step.value);
    assert.ok(line.barrier < before);
  }
  assert.fail("it never ends");
});

test("there are n! orders, each once", () => {
  const all = [...B.orders(5)].map((order) => order.join());
  assert.strictEqual(all.length, 120);
  assert.strictEqual(new Set(all).size, 120);
});

test("the assignment is the best of all orders", () => {
  for (let seed = 1; seed <= 20; seed++) {
    const draw = random(seed);
    const gain = Array.from({ length: 6 }, () => Array.from({ length: 6 }, draw));
    const sum = (order) => order.reduce((total, j, i) => total + gain[i][j], 0);
    const most = Math.max(...[...B.orders(6)].map(sum));
    close(sum(B.assign(gain)), most);
  }
});

test("swaps lead to the target, no more than needed", () => {
  const target = [3, 0, 1, 2, 5, 4];
  const now = identity(6);
  const swaps = B.swapsTowards(now, target);
  for (const [i, k] of swaps) [now[i], now[k]] = [now[k], now[i]];
  assert.deepStrictEqual(now, target);
  assert.strictEqual(swaps.length, 4); // six units, two cycles
  assert.deepStrictEqual(B.swapsTowards(target, target), []);
});

test("a unit that never changes correlates with nothing", () => {
  const pair = smallPair(3);
  pair.z1.fill(-1, 0, 30); // silent after the ReLU
  const found = B.correlations(pair);
  assert.deepStrictEqual(found[0], [0, 0, 0]);
  found.flat().forEach((value) => assert.ok(Math.abs(value) <= 1 + 1e-12));
});
