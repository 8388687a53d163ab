// The line between two networks with one hidden layer, for any order of the units (chapter 4).
//
// Pre-activations move in straight lines, z(t) = (1 - t) z1 + t z2, and so does the output layer. So
// the loss at every t follows from z1, z2 and the two output layers; no network is run. Unit j of
// the second network stands beside unit i of the first: j = order[i]. A swap of two units changes
// only their terms in the logits, which are kept for each t.

"use strict";

// What a figure holds as text: 16-bit integers, base64, one scale for each unit.
function unpack(text, scales) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const whole = new Int16Array(bytes.buffer);
  const length = whole.length / scales.length;
  return Float64Array.from(whole, (v, k) => v * scales[Math.floor(k / length)]);
}

// {images, units, classes, z1, z2 [units x images], A1, A2 [units x classes], b1, b2, labels}
function pairOf(data) {
  return {
    images: data.labels.length,
    units: data.scales1.length,
    classes: data.b1.length,
    z1: unpack(data.z1, data.scales1),
    z2: unpack(data.z2, data.scales2),
    A1: Float64Array.from(data.A1.flat()),
    A2: Float64Array.from(data.A2.flat()),
    b1: data.b1,
    b2: data.b2,
    labels: data.labels,
  };
}

// What unit i of the first and unit j of the second weigh in the logits at t.
function weightsAt(pair, t, i, j) {
  const { classes, A1, A2 } = pair;
  const weights = new Float64Array(classes);
  for (let c = 0; c < classes; c++) {
    weights[c] = (1 - t) * A1[i * classes + c] + t * A2[j * classes + c];
  }
  return weights;
}

// Adds to the logits at t what unit i of the first and unit j of the second give together.
function addUnit(pair, logits, t, i, j) {
  const { images, classes, z1, z2 } = pair;
  const weights = weightsAt(pair, t, i, j);
  for (let k = 0; k < images; k++) {
    const h = (1 - t) * z1[i * images + k] + t * z2[j * images + k];
    if (h <= 0) continue;
    const at = k * classes;
    for (let c = 0; c < classes; c++) logits[at + c] += h * weights[c];
  }
}

// The same for unit j in place of `old`: one pass over the logits.
function replaceUnit(pair, logits, t, i, old, j) {
  const { images, classes, z1, z2 } = pair;
  const [before, after] = [weightsAt(pair, t, i, old), weightsAt(pair, t, i, j)];
  for (let k = 0; k < images; k++) {
    const own = (1 - t) * z1[i * images + k];
    const was = Math.max(0, own + t * z2[old * images + k]);
    const is = Math.max(0, own + t * z2[j * images + k]);
    if (was === 0 && is === 0) continue;
    const at = k * classes;
    for (let c = 0; c < classes; c++) logits[at + c] += is * after[c] - was * before[c];
  }
}

function logitsAt(pair, order, t) {
  const { images, classes, b1, b2 } = pair;
  const logits = new Float64Array(images * classes);
  for (let k = 0; k < logits.length; k++) {
    const c = k % classes;
    logits[k] = (1 - t) * b1[c] + t * b2[c];
  }
  order.forEach((j, i) => addUnit(pair, logits, t, i, j));
  return logits;
}

// The mean cross-entropy, in nats.
function crossEntropy(logits, labels, classes) {
  let sum = 0;
  for (let k = 0, at = 0; k < labels.length; k++, at += classes) {
    let top = -Infinity;
    for (let c = 0; c < classes; c++) if (logits[at + c] > top) top = logits[at + c];
    let total = 0;
    for (let c = 0; c < classes; c++) total += Math.exp(logits[at + c] - top);
    sum += Math.log(total) + top - logits[at + labels[k]];
  }
  return sum / labels.length;
}

// How far the losses rise above the straight line between the first and the last; 0 if nowhere.
function barrier(ts, losses) {
  const first = losses[0];
  const last = losses[losses.length - 1];
  return Math.max(0, ...losses.map((loss, k) => loss - (1 - ts[k]) * first - ts[k] * last));
}

// The loss at each t for an order that changes by swaps.
class Line {
  constructor(pair, ts, order) {
    this.pair = pair;
    this.ts = ts;
    this.set(order);
  }

  set(order) {
    this.order = [...order];
    this.logits = this.ts.map((t) => logitsAt(this.pair, this.order, t));
    this.losses = this.logits.map((x) => this.#loss(x));
  }

  #loss(logits) {
    return crossEntropy(logits, this.pair.labels, this.pair.classes);
  }

  #exchange(logits, t, i, k) {
    const { order, pair } = this;
    replaceUnit(pair, logits, t, i, order[i], order[k]);
    replaceUnit(pair, logits, t, k, order[k], order[i]);
  }

  // Exchange the partners of units i and k of the first network.
  swap(i, k) {
    if (i === k) return;
    this.ts.forEach((t, at) => {
      if (t === 0 || t === 1) return; // an end is a network of its own, whatever the order
      this.#exchange(this.logits[at], t, i, k);
      this.losses[at] = this.#loss(this.logits[at]);
    });
    [this.order[i], this.order[k]] = [this.order[k], this.order[i]];
  }

  // The losses after that swap, which is not made.
  tried(i, k) {
    if (i === k) return [...this.losses];
    return this.ts.map((t, at) => {
      if (t === 0 || t === 1) return this.losses[at];
      const logits = this.logits[at].slice();
      this.#exchange(logits, t, i, k);
      return this.#loss(logits);
    });
  }

  get barrier() {
    return barrier(this.ts, this.losses);
  }
}

// Every pair of units, in turn: yields how many were tried, returns the swap that lowers the barrier
// most, or null if none lowers it.
function* bestSwap(line) {
  const units = line.order.length;
  let best = null;
  let least = line.barrier - 1e-9;
  let done = 0;
  for (let i = 0; i < units; i++) {
    for (let k = i + 1; k < units; k++) {
      const height = barrier(line.ts, line.tried(i, k));
      if (height < least) [best, least] = [[i, k], height];
      yield ++done;
    }
  }
  return best;
}

// Correlations of the units' outputs after the ReLU over the images, [units x units]; 0 for a unit
// that never changes.
function correlations(pair) {
  const { images, units } = pair;
  const standard = (z) => {
    const out = new Float64Array(z.length);
    for (let i = 0; i < units; i++) {
      const at = i * images;
      let mean = 0;
      for (let k = 0; k < images; k++) mean += Math.max(0, z[at + k]) / images;
      let variance = 0;
      for (let k = 0; k < images; k++) variance += (Math.max(0, z[at + k]) - mean) ** 2 / images;
      const scale = variance > 0 ? 1 / Math.sqrt(variance) : 0;
      for (let k = 0; k < images; k++) out[at + k] = (Math.max(0, z[at + k]) - mean) * scale;
    }
    return out;
  };
  const [u, v] = [standard(pair.z1), standard(pair.z2)];
  return Array.from({ length: units }, (_, i) =>
    Array.from({ length: units }, (_, j) => {
      let sum = 0;
      for (let k = 0; k < images; k++) sum += u[i * images + k] * v[j * images + k];
      return sum / images;
    }),
  );
}

// The order with the largest sum of gain[i][order[i]]: the Hungarian algorithm with potentials,
// one row after another along a shortest augmenting path (Crouse 2016).
function assign(gain) {
  const n = gain.length;
  const u = new Float64Array(n + 1);
  const v = new Float64Array(n + 1);
  const rowOf = new Int32Array(n + 1); // of each column, counted from 1; 0: free
  const before = new Int32Array(n + 1);
  for (let row = 1; row <= n; row++) {
    rowOf[0] = row;
    let column = 0;
    const slack = new Float64Array(n + 1).fill(Infinity);
    const seen = new Uint8Array(n + 1);
    do {
      seen[column] = 1;
      const i = rowOf[column];
      let step = Infinity;
      let next = 0;
      for (let j = 1; j <= n; j++) {
        if (seen[j]) continue;
        const reduced = -gain[i - 1][j - 1] - u[i] - v[j];
        if (reduced < slack[j]) [slack[j], before[j]] = [reduced, column];
        if (slack[j] < step) [step, next] = [slack[j], j];
      }
      for (let j = 0; j <= n; j++) {
        if (seen[j]) [u[rowOf[j]], v[j]] = [u[rowOf[j]] + step, v[j] - step];
        else slack[j] -= step;
      }
      column = next;
    } while (rowOf[column] !== 0);
    while (column !== 0) {
      rowOf[column] = rowOf[before[column]];
      column = before[column];
    }
  }
  const order = new Array(n);
  for (let j = 1; j <= n; j++) order[rowOf[j] - 1] = j - 1;
  return order;
}

// Swaps, one after another, that lead from one order to another: n less the number of cycles.
function swapsTowards(order, target) {
  const now = [...order];
  const swaps = [];
  target.forEach((j, i) => {
    if (now[i] === j) return;
    const k = now.indexOf(j);
    swaps.push([i, k]);
    [now[i], now[k]] = [now[k], now[i]];
  });
  return swaps;
}

// The mean distance of pre-activations: how the bound of chapter 5 depends on the order.
function meanDistance(pair, order) {
  const { images, z1, z2 } = pair;
  const squares = new Float64Array(images);
  order.forEach((j, i) => {
    for (let k = 0; k < images; k++) {
      squares[k] += (z1[i * images + k] - z2[j * images + k]) ** 2;
    }
  });
  return squares.reduce((sum, square) => sum + Math.sqrt(square), 0) / images;
}

// All orders of n units, n! of them.
function* orders(n) {
  if (n === 0) {
    yield [];
    return;
  }
  for (const shorter of orders(n - 1)) {
    for (let at = 0; at < n; at++) {
      yield [...shorter.slice(0, at), n - 1, ...shorter.slice(at)];
    }
  }
}

const Barrier = {
  pairOf, logitsAt, crossEntropy, barrier, Line, bestSwap, correlations, assign, swapsTowards,
  meanDistance, orders,
};
if (typeof module !== "undefined") module.exports = Barrier;
