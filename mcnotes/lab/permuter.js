// The living figure: units to drag, and the loss on the line that follows (chapters 3, 4 and 5).
// What it computes stands in barrier.js; here it is drawn, and moved by mouse, touch and keyboard.

"use strict";

function permuter(box, data) {
  const B = Barrier;
  const pair = B.pairOf(data);
  const n = pair.units;
  const identity = Array.from({ length: n }, (_, i) => i);
  const gains = B.correlations(pair);
  const aligned = B.assign(gains);
  const ts = Array.from({ length: 13 }, (_, k) => k / 12);
  const coarse = ts.filter((_, k) => k % 2 === 0);
  const line = new B.Line(pair, ts, identity);
  const before = [...line.losses];
  line.set(aligned);
  const after = [...line.losses];
  line.set(identity);
  const best = { order: identity, barrier: line.barrier };
  const past = [];
  const drawn = []; // what each place shows: only what changed is drawn again
  let picked = null; // the slot whose unit of B was taken up
  let playing = null; // the timer of the animated alignment
  let searching = false;
  let compared = false;

  const make = (name, attributes = {}, ...children) => {
    const node = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
      if (key in node && key !== "style") node[key] = value;
      else node.setAttribute(key, value);
    }
    node.append(...children);
    return node;
  };
  const draw = (name, attributes = {}, ...children) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.append(...children);
    return node;
  };
  const sum = (order) => order.reduce((total, j, i) => total + gains[i][j], 0);
  const signed = (value) => (value < 0 ? "−" : "") + Math.abs(value).toFixed(2);

  // Blue for negative, red for positive, as in the book's matrices.
  const shade = (value) => {
    const v = Math.max(-1, Math.min(1, value));
    const [r, g, b] = v < 0 ? [33, 102, 172] : [178, 24, 43];
    const mix = (channel) => Math.round(247 + (channel - 247) * Math.abs(v));
    return [mix(r), mix(g), mix(b), 255];
  };
  const paint = (canvas, width, height, valueAt) => {
    canvas.width = width;
    canvas.height = height;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    for (let k = 0; k < width * height; k++) image.data.set(shade(valueAt(k)), 4 * k);
    context.putImageData(image, 0, 0);
  };
  const weights = {};
  for (const which of ["picturesA", "picturesB"]) if (data[which]) weights[which] = atob(data[which]);
  const picture = (which, unit) => {
    if (!data[which]) return make("span", { className: "number", textContent: String(unit + 1) });
    const canvas = make("canvas", { ariaHidden: "true" });
    const { width, height } = data;
    const at = unit * width * height;
    paint(canvas, width, height, (k) => (weights[which].charCodeAt(at + k) - 128) / 127);
    return canvas;
  };

  // The slots: a unit of A above, the unit of B that stands beside it below.
  const unitsA = identity.map((i) => picture("picturesA", i));
  const unitsB = identity.map((j) => picture("picturesB", j));
  const ties = identity.map(() => make("span", { className: "tie", ariaHidden: "true" }));
  const buttons = identity.map(() => make("button", { className: "unit", type: "button" }));
  const slots = identity.map((i) => make("div", { className: "slot" }, unitsA[i], ties[i], buttons[i]));
  const grid = make("div", { className: "slots", role: "group" }, ...slots);
  grid.setAttribute("aria-label", "Units of B, each below the unit of A beside which it stands");
  const columns = Math.min(8, n);
  grid.style.gridTemplateColumns = `repeat(${columns}, minmax(0, 1fr))`;

  const say = make("p", { className: "say" });
  say.setAttribute("aria-live", "polite");

  const button = (text, action) => make("button", { type: "button", textContent: text, onclick: action });
  const controls = {
    shuffle: button("Shuffle", () => jump(shuffled(), "Shuffled.")),
    undo: button("Undo", undo),
    swap: button("Best swap", search),
    align: button("Align", play),
    step: button("One step", () => advance()),
    compare: button("Compare with alignment", compare),
    best: button("My best", () => jump(best.order, "Your best order so far.")),
    reset: button("Start again", () => jump(identity, "As given.")),
  };
  const bar = make("div", { className: "bar" }, ...Object.values(controls));

  // The chart.
  const wide = 420;
  const high = 230;
  const [left, low] = [44, high - 34];
  const top = Math.max(...before, ...after, 1e-3) * 1.25;
  const x = (t) => left + t * (wide - left - 8);
  const y = (loss) => low - (Math.min(loss, 1.6 * top) / top) * (low - 12);
  const points = (losses) => losses.map((v, k) => `${x(ts[k]).toFixed(1)},${y(v).toFixed(1)}`).join(" ");
  const curve = (name, losses) => draw("polyline", { class: name, points: points(losses) });
  const mine = curve("mine", line.losses);
  const here = draw("line", { class: "here", y1: 8, y2: low });
  const chart = draw("svg", { viewBox: `0 0 ${wide} ${high}`, role: "img" });
  chart.append(draw("path", { class: "axis", d: `M${left} 8V${low}H${wide - 8}` }));
  const scale = 10 ** Math.floor(Math.log10(top));
  const gap = top / scale > 5 ? 2 * scale : top / scale > 2 ? scale : scale / 2;
  for (let tick = 0; tick <= top; tick += gap) {
    const text = draw("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" });
    text.textContent = tick.toFixed(scale < 1 ? 2 : 1);
    chart.append(text, draw("path", { class: "axis", d: `M${left - 3} ${y(tick)}h3` }));
  }
  for (const t of [0, 0.5, 1]) {
    const text = draw("text", { x: x(t), y: low + 16, "text-anchor": "middle" });
    text.textContent = t === 0 ? "A" : t === 1 ? "B" : "t = 0.5";
    chart.append(text);
  }
  const title = draw("text", { x: left, y: high - 2 });
  title.textContent = "test loss (nats) on the straight line from A to B";
  chart.append(title, curve("before", before), curve("after", after), mine, here);

  const bounds = data.norms ? theorem() : null;

  // The table.
  const cells = {};
  const row = (name, text, kind, order, height) => {
    cells[name] = [make("td"), make("td")];
    fill(name, order, height);
    const head = make("th", { scope: "row" }, make("span", { className: `key ${kind}` }, text));
    return make("tr", {}, head, ...cells[name]);
  };
  function fill(name, order, height) {
    cells[name][0].textContent = signed(sum(order));
    cells[name][1].textContent = height.toFixed(3);
  }
  const headings = ["order of B's units", "correlations, summed", "barrier (nats)"];
  const table = make("table", {},
    make("thead", {}, make("tr", {}, ...headings.map((h) => make("th", { scope: "col", textContent: h })))),
    make("tbody", {},
      row("before", "as given", "before", identity, line.barrier),
      row("after", "aligned", "after", aligned, B.barrier(ts, after)),
      row("mine", "yours, now", "", identity, line.barrier),
      row("best", "your best", "none", identity, line.barrier)));

  // What the network at t gets wrong.
  const knob = make("input", { type: "range", min: 0, max: 12, value: 6 });
  knob.setAttribute("aria-label", "position t on the line");
  const place = make("output");
  knob.addEventListener("input", () => { showPlace(); });
  const errors = make("p", { className: "say" });
  const sheet = make("div", { className: "pictures" });
  const faults = Array.from({ length: data.sheet ? data.shown : 0 }, (_, k) => draw("rect", {
    class: "wrong", x: (k % data.across) * data.tile + 1.5, y: Math.floor(k / data.across) * data.tile + 1.5,
    width: data.tile - 3, height: data.tile - 3,
  }));
  if (data.sheet) {
    const [width, height] = [data.across * data.tile, Math.ceil(data.shown / data.across) * data.tile];
    const frame = { viewBox: `0 0 ${width} ${height}`, class: "cover", "aria-hidden": "true" };
    sheet.append(make("img", { className: "pictures", src: data.sheet, alt: "", width, height }), draw("svg", frame, ...faults));
  }

  // The matrix, in B's own order; the chosen cells are ringed.
  const map = make("canvas", {});
  paint(map, n, n, (k) => gains[Math.floor(k / n)][k % n]);
  const rings = draw("svg", { viewBox: `0 0 ${n} ${n}`, class: "cover", "aria-hidden": "true" });
  const ring = identity.map((i) => draw("circle", { cy: i + 0.5, r: 0.42, fill: "none", "stroke-width": n > 8 ? 0.22 : 0.07 }));
  ring.forEach((circle) => (circle.style.stroke = "#000"));
  rings.append(...ring);
  const matrix = make("div", { className: "matrix" },
    make("p", { className: "head", textContent: "Correlation: A's units down, B's across" }),
    make("div", { className: "pictures" }, map, rings));

  const strip = n <= 5 ? allOrders() : null;
  const wrong = make("div", {}, make("p", { className: "head", textContent: "Wrong at this t (ringed)" }), sheet, errors);
  if (!data.sheet) wrong.hidden = true;
  box.replaceChildren(make("div", { className: "parts" },
    make("div", {}, make("p", { className: "head", textContent: "Above, a unit of A; below it, its partner in B" }),
      grid, bar, say, ...(strip ? [strip.node] : [])),
    make("div", {}, chart, ...(bounds ? [bounds.node] : []), make("label", {}, "t", knob, place), table,
      make("div", { className: "two" }, matrix, wrong))));
  show("Drag a unit of B beside another unit of A, or press Enter on one, move with the arrow keys, and press Enter again.");

  // ---- what changes -------------------------------------------------------------------------

  function show(words) {
    line.order.forEach((j, i) => {
      const other = compared && aligned[i] !== j;
      const state = `${j} ${picked === i} ${other}`;
      if (drawn[i] === state) return;
      drawn[i] = state;
      const c = gains[i][j];
      buttons[i].replaceChildren(unitsB[j]);
      ties[i].style.setProperty("--wide", `${1 + 9 * Math.max(0, c)}px`);
      ties[i].classList.toggle("good", c > 0.5);
      ring[i].setAttribute("cx", j + 0.5);
      buttons[i].setAttribute("aria-label", `unit ${j + 1} of B beside unit ${i + 1} of A, correlation ${signed(c)}`);
      buttons[i].setAttribute("aria-pressed", String(picked === i));
      slots[i].classList.toggle("other", other);
    });
    mine.setAttribute("points", points(line.losses));
    const height = line.barrier;
    chart.setAttribute("aria-label",
      `Test loss against t. Barrier as given ${B.barrier(ts, before).toFixed(3)}, aligned ` +
      `${B.barrier(ts, after).toFixed(3)}, in your order ${height.toFixed(3)} nats.`);
    fill("mine", line.order, height);
    if (height < best.barrier - 1e-9) {
      best.order = [...line.order];
      best.barrier = height;
      fill("best", best.order, height);
    }
    controls.undo.disabled = past.length === 0;
    const done = line.order.every((j, i) => j === aligned[i]);
    controls.align.disabled = controls.step.disabled = done;
    controls.best.disabled = line.order.every((j, i) => j === best.order[i]);
    controls.align.textContent = playing ? "Pause" : "Align";
    controls.compare.setAttribute("aria-pressed", String(compared));
    if (bounds) bounds.update();
    if (strip) strip.update();
    showPlace();
    say.setAttribute("aria-busy", String(playing !== null || searching)); // only the end is read out
    if (words) say.textContent = words;
  }

  function showPlace() {
    const at = +knob.value;
    place.textContent = ts[at].toFixed(2);
    here.setAttribute("x1", x(ts[at]));
    here.setAttribute("x2", x(ts[at]));
    const { classes, labels } = pair;
    const logits = line.logits[at];
    const isWrong = (k) => {
      for (let c = 0; c < classes; c++) {
        if (logits[k * classes + c] > logits[k * classes + labels[k]]) return true;
      }
      return false;
    };
    let count = 0;
    for (let k = 0; k < labels.length; k++) count += isWrong(k);
    const share = (100 * count / labels.length).toFixed(1);
    errors.textContent = `${share} % of ${labels.length} test images are wrong.`;
    knob.setAttribute("aria-valuetext", `t = ${ts[at].toFixed(2)}, loss ${line.losses[at].toFixed(3)}, ${share} % wrong`);
    faults.forEach((rect, k) => { rect.style.display = isWrong(k) ? "" : "none"; });
  }

  function swap(i, k, words) {
    if (i === k) return;
    past.push([...line.order]);
    line.swap(i, k);
    show(words ?? `Units ${line.order[i] + 1} and ${line.order[k] + 1} of B changed places. Barrier ${line.barrier.toFixed(3)} nats.`);
  }

  function jump(order, words) {
    stop();
    past.push([...line.order]);
    line.set(order);
    show(`${words} Barrier ${line.barrier.toFixed(3)} nats.`);
  }

  function undo() {
    stop();
    const last = past.pop();
    const moved = identity.filter((i) => last[i] !== line.order[i]);
    if (moved.length === 2) line.swap(...moved);
    else line.set(last);
    show(`Undone. Barrier ${line.barrier.toFixed(3)} nats.`);
  }

  function shuffled() {
    const order = [...identity];
    for (let i = n - 1; i > 0; i--) {
      const k = Math.floor(Math.random() * (i + 1));
      [order[i], order[k]] = [order[k], order[i]];
    }
    return order;
  }

  function advance() {
    const [next] = B.swapsTowards(line.order, aligned);
    if (!next) return stop();
    swap(...next, `Unit ${aligned[next[0]] + 1} of B goes beside unit ${next[0] + 1} of A: correlation ${signed(gains[next[0]][aligned[next[0]]])}. Barrier ${line.barrier.toFixed(3)} nats.`);
  }

  function play() {
    if (playing) return stop();
    const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    playing = setInterval(() => {
      advance();
      if (B.swapsTowards(line.order, aligned).length === 0) stop();
    }, still ? 0 : 220);
    show();
  }

  function stop() {
    clearInterval(playing);
    playing = null;
    show();
  }

  function compare() {
    compared = !compared;
    const other = aligned.filter((j, i) => j !== line.order[i]).length;
    show(compared ? `${n - other} of ${n} units stand where alignment puts them; the others are tinted.` : "");
  }

  // One step of a greedy search, a few milliseconds at a time so that the page stays alive.
  function search() {
    if (searching) return;
    stop();
    searching = true;
    show();
    const rough = new B.Line(pair, coarse, line.order);
    const steps = B.bestSwap(rough);
    const all = (n * (n - 1)) / 2;
    const work = () => {
      const until = performance.now() + 10;
      let step;
      do step = steps.next(); while (!step.done && performance.now() < until);
      if (!step.done) {
        say.textContent = `Trying all ${all} swaps: ${Math.round((100 * step.value) / all)} %`;
        return requestAnimationFrame(work);
      }
      searching = false;
      const same = rough.order.every((j, i) => j === line.order[i]);
      if (!same) return show("The order was changed meanwhile: search again.");
      if (!step.value) return show("No single swap lowers the barrier any more.");
      const old = line.barrier;
      swap(...step.value);
      show(`The best of ${all} swaps: the barrier falls from ${old.toFixed(3)} to ${line.barrier.toFixed(3)} nats.`);
    };
    work();
  }

  // ---- pointer and keys ---------------------------------------------------------------------

  buttons.forEach((unit, i) => {
    unit.tabIndex = i === 0 ? 0 : -1;
    let from = null;
    let over = null;
    let moved = false; // a drag ends with a click, which is none
    const leave = () => {
      if (over !== null) slots[over].classList.remove("over");
      over = null;
    };
    unit.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      stop();
      from = [event.clientX, event.clientY];
      unit.setPointerCapture(event.pointerId);
    });
    unit.addEventListener("pointermove", (event) => {
      if (!from) return;
      const [dx, dy] = [event.clientX - from[0], event.clientY - from[1]];
      if (!unit.classList.contains("dragged") && Math.hypot(dx, dy) < 6) return;
      unit.classList.add("dragged");
      unit.style.transform = `translate(${dx}px, ${dy}px)`;
      const under = slots.findIndex((slot) => {
        const r = slot.getBoundingClientRect();
        return event.clientX >= r.left && event.clientX <= r.right && event.clientY >= r.top && event.clientY <= r.bottom;
      });
      if (under === (over ?? -1)) return;
      leave();
      if (under < 0 || under === i) return;
      over = under;
      slots[over].classList.add("over");
      const losses = line.tried(i, over);
      mine.setAttribute("points", points(losses));
      say.textContent = `If you let go here: barrier ${B.barrier(ts, losses).toFixed(3)} nats.`;
    });
    const end = (event) => {
      if (!from) return;
      const dragged = unit.classList.contains("dragged");
      const target = over;
      from = null;
      moved = dragged;
      leave();
      unit.classList.remove("dragged");
      unit.style.transform = "";
      if (event.type === "pointercancel" || (dragged && target === null)) return show("");
      if (dragged) return swap(i, target);
    };
    unit.addEventListener("pointerup", end);
    unit.addEventListener("pointercancel", end);
    unit.addEventListener("click", () => {
      if (!moved) choose(i);
      moved = false;
    });
    unit.addEventListener("keydown", (event) => keys(event, i));
  });

  function choose(i) {
    if (picked === null) {
      picked = i;
      return show(`Unit ${line.order[i] + 1} of B is taken up. Choose another place, or press Escape.`);
    }
    const from = picked;
    picked = null;
    if (from === i) return show("Put back.");
    swap(from, i);
  }

  function keys(event, i) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
    if (event.key === "Escape" && picked !== null) {
      picked = null;
      return show("Put back.");
    }
    let to = i + (steps[event.key] ?? 0);
    if (event.key === "Home") to = 0;
    if (event.key === "End") to = n - 1;
    if (to === i || to < 0 || to >= n) return;
    event.preventDefault();
    buttons[i].tabIndex = -1;
    buttons[to].tabIndex = 0;
    buttons[to].focus();
    if (picked === null) return;
    const losses = line.tried(picked, to);
    mine.setAttribute("points", points(losses));
    say.textContent = `Beside unit ${to + 1} of A: correlation ${signed(gains[to][line.order[picked]])}, barrier ${B.barrier(ts, losses).toFixed(3)} nats.`;
  }

  // ---- what only chapters 3 and 5 show ------------------------------------------------------

  // The bound of chapter 5 on the height above the chord, on an axis of its own.
  function theorem() {
    const at = (order) => {
      const distance = B.meanDistance(pair, order);
      return ts.map((t) => Math.SQRT2 * t * (1 - t) * data.norms * distance);
    };
    const [first, second] = [at(identity), at(aligned)];
    const most = Math.max(...first, ...second) * 1.15;
    const up = (value) => 96 - (Math.min(value, most) / most) * 84;
    const text = (values) => values.map((v, k) => `${x(ts[k]).toFixed(1)},${up(v).toFixed(1)}`).join(" ");
    const now = draw("polyline", { class: "bound" });
    const svg = draw("svg", { viewBox: `0 0 ${wide} 116`, role: "img" });
    svg.append(draw("path", { class: "axis", d: `M${left} 8V96H${wide - 8}` }));
    for (const value of [0, Math.round(most / 1.15)]) {
      const tick = draw("text", { x: left - 6, y: up(value) + 4, "text-anchor": "end" });
      tick.textContent = String(value);
      svg.append(tick);
    }
    const caption = draw("text", { x: left, y: 112 });
    caption.textContent = "the theorem's bound of the height above the chord (nats)";
    svg.append(caption, draw("polyline", { class: "before", points: text(first) }),
      draw("polyline", { class: "after", points: text(second) }), now);
    const update = () => {
      const values = at(line.order);
      now.setAttribute("points", text(values));
      svg.setAttribute("aria-label", `The bound at t = 0.5: ${values[6].toFixed(1)} nats in your order, ` +
        `${first[6].toFixed(1)} as given, ${second[6].toFixed(1)} aligned.`);
    };
    return { node: svg, update };
  }

  // Few units: the barrier of every order there is, the lowest first; the reader's is marked.
  function allOrders() {
    const rough = new B.Line(pair, coarse, identity);
    const left = [...B.orders(n)];
    const found = [];
    const bars = new Map();
    const svg = draw("svg", { viewBox: `0 0 ${wide} 90`, role: "img" });
    const caption = draw("text", { x: 0, y: 87 });
    svg.append(caption);
    const work = () => {
      const until = performance.now() + 8; // in slices, so that the page stays alive
      while (left.length && performance.now() < until) {
        rough.set(left.pop());
        found.push({ key: rough.order.join(), height: rough.barrier });
      }
      if (left.length) return setTimeout(work);
      found.sort((a, b) => a.height - b.height);
      const most = found[found.length - 1].height || 1;
      const step = wide / found.length;
      found.forEach(({ key, height }, k) => {
        const tall = 1 + (70 * height) / most;
        const bar = draw("rect", { x: k * step, width: 0.8 * step, y: 72 - tall, height: tall });
        bars.set(key, { bar, rank: k + 1 });
        svg.append(bar);
      });
      update();
    };
    setTimeout(work);
    const update = () => {
      if (bars.size === 0) return;
      for (const { bar } of bars.values()) bar.style.fill = "var(--line)";
      bars.get(aligned.join()).bar.style.fill = "var(--after)";
      bars.get(identity.join()).bar.style.fill = "var(--before)";
      const { bar, rank } = bars.get(line.order.join());
      bar.style.fill = "var(--mine)";
      caption.textContent = `All ${found.length} orders by their barrier; yours is number ${rank} from below.`;
      svg.setAttribute("aria-label", caption.textContent);
    };
    return { node: svg, update };
  }
}
