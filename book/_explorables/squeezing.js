// One negative step on a softmax, for the reader to move: bars, the label that is pushed down, the size of the step.
// The live figure stands in the place of a static one, which is what is seen without scripts and on paper.
(() => {
  "use strict";

  /** Bars that are moved stay inside the open simplex, where the theorem holds and proportions are never lost. */
  const LEAST = 0.001;
  const MOST = 0.99;
  const LARGEST_STEP = 30;
  /** The step's slider: how many places it has, and how strongly its scale bends from linear to logarithmic. */
  const PLACES = 200;
  const BEND = 6;
  /** Milliseconds without a change after which the outcome is said to those who do not see it. */
  const PAUSE = 400;
  const EDGE = { top: 30, right: 6, bottom: 50, left: 46 };
  const TICKS = [0, 0.2, 0.4, 0.6, 0.8, 1];
  const STRIDES = { ArrowUp: 0.01, ArrowRight: 0.01, ArrowDown: -0.01, ArrowLeft: -0.01, PageUp: 0.1, PageDown: -0.1 };

  // Mathematics ------------------------------------------------------------------------------------------------------

  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const within = (low, high, value) => Math.min(high, Math.max(low, value));

  /** Throw unless p is a probability vector, y one of its labels and s a step. */
  const check = (p, y, s) => {
    const fair = Array.isArray(p) && p.length > 1 && p.every((value) => Number.isFinite(value) && value >= 0);
    if (!fair || Math.abs(sum(p) - 1) > 1e-9) throw new RangeError(`p: expected probabilities that sum to 1, got ${p}`);
    if (!Number.isInteger(y) || !(y in p)) throw new RangeError(`y: expected a label below ${p.length}, got ${y}`);
    if (!Number.isFinite(s) || s < 0) throw new RangeError(`s: expected a finite step, zero or more, got ${s}`);
  };

  /**
   * The exact outcome of z' = z + s (p - e_y), one negative gradient step on label y.
   * @param {number[]} p Probabilities before the step.
   * @param {number} y The label that is pushed down, counted from 0.
   * @param {number} s The step, zero or more; at 0 the threshold and the directions are their limits.
   * @returns {{after: number[], threshold: number, normaliser: number, directions: number[], rising: number[]}}
   *   Probabilities after the step; the threshold log(Z)/s; Z; for each label +1 (rises), -1 (falls) or 0; the
   *   labels that rise.
   */
  const compute = (p, y, s) => {
    check(p, y, s);
    const drive = p.map((value, label) => (label === y ? value - 1 : value));
    const threshold = freeEnergy(p, drive, s);
    const directions = p.map((value, label) => (value > 0 ? Math.sign(drive[label] - threshold) : 0));
    return {
      after: p.map((value, label) => value * Math.exp(s * (drive[label] - threshold))),
      threshold,
      normaliser: Math.exp(s * threshold),
      directions,
      rising: [...p.keys()].filter((label) => directions[label] > 0),
    };
  };

  /** log(sum_j p_j exp(s a_j)) / s, without cancellation for small s and without overflow for large. */
  const freeEnergy = (p, drive, s) => {
    if (s === 0) return sum(p.map((value, label) => value * drive[label]));
    if (s < 1) return Math.log1p(sum(p.map((value, label) => value * Math.expm1(s * drive[label])))) / s;
    const top = Math.max(...drive);
    return top + Math.log(sum(p.map((value, label) => value * Math.exp(s * (drive[label] - top))))) / s;
  };

  /**
   * Give one label a new probability; the others share the rest in the proportions they had (equally, if all were 0).
   * @param {number[]} p Probabilities.
   * @param {number} label Whose probability changes.
   * @param {number} value What it is to be; held between 0.001 and 0.99.
   * @returns {number[]} The new probabilities.
   */
  const withBar = (p, label, value) => {
    const kept = within(LEAST, MOST, value);
    const rest = sum(p.filter((_, other) => other !== label));
    const share = (before) => (rest > 0 ? (before / rest) * (1 - kept) : (1 - kept) / (p.length - 1));
    return p.map((before, other) => (other === label ? kept : share(before)));
  };

  /** The step at a place of the slider, to three digits: 0 at the first, then almost a logarithmic scale to 30. */
  const stepAt = (place) =>
    Number(((LARGEST_STEP * Math.expm1((BEND * place) / PLACES)) / Math.expm1(BEND)).toPrecision(3));

  /** The place of the slider nearest to a step. */
  const placeOf = (s) => Math.round((PLACES * Math.log1p((s / LARGEST_STEP) * Math.expm1(BEND))) / BEND);

  // Words ------------------------------------------------------------------------------------------------------------

  const signed = (text) => text.replace("-", "−");
  const fixed = (value) => signed(value.toFixed(3));
  const raised = (exponent) => [...exponent].map((digit) => (digit === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit])).join("");

  /** A number to three decimals, or, where that would hide it, as a power of ten. */
  const shown = (value) => {
    const size = Math.abs(value);
    if (size === 0 || (size >= 0.001 && size < 1000)) return fixed(value);
    const [digits, exponent] = value.toExponential(1).split("e");
    return `${signed(digits)} × 10${raised(exponent.replace("+", ""))}`;
  };

  /** Labels go by letters where they are read, and by their places from 0 everywhere else. */
  const named = (label) => "abcdefghijklmnopqrstuvwxyz"[label];
  const listed = (labels) => (labels.length ? ` (${labels.map(named).join(", ")})` : "");
  const peakOf = (p, y) => p.reduce((best, value, label) => (label !== y && !(p[best] >= value) ? label : best), -1);
  const fate = (direction) => ["falls", "stays", "rises"][direction + 1];

  /** What happens, in words. */
  const account = ({ p, y, s }, { after, threshold, rising }) => {
    const peak = peakOf(p, y);
    const verb = s === 0 ? "would rise" : rising.length === 1 ? "rises" : "rise";
    return (
      `Label ${named(y)} is pushed down with step ${s}. The threshold is ${shown(threshold)}. ` +
      `Of the ${p.length - 1} other labels ${rising.length} ${verb}${listed(rising)}. ` +
      `The peak, label ${named(peak)}, goes from ${fixed(p[peak])} to ${fixed(after[peak])}.`
    );
  };

  /** The rows of the readout: what is measured and its value. */
  const readings = ({ p, y, s }, { after, threshold, normaliser, rising }) => {
    const peak = peakOf(p, y);
    return [
      ["threshold τ(s)", shown(threshold)],
      ["normaliser Z", shown(normaliser)],
      [`pushed down: label ${named(y)}`, `${shown(p[y])} → ${shown(after[y])}`],
      [`peak of the others: label ${named(peak)}`, `${shown(p[peak])} → ${shown(after[peak])}`],
      [s === 0 ? "others that would rise" : "others that rise", `${rising.length} of ${p.length - 1}${listed(rising)}`],
    ];
  };

  // Elements ---------------------------------------------------------------------------------------------------------

  const set = (element, attributes) => {
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };
  const make = (element, attributes, children) => {
    set(element, attributes).append(...children);
    return element;
  };
  const html = (name, attributes = {}, ...children) => make(document.createElement(name), attributes, children);
  const svg = (name, attributes = {}, ...children) =>
    make(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

  /** The parts of one bar: a slider with the outline before the step, the filled bar after it, a grip and an arrow. */
  const makeBar = (label) => {
    const parts = {
      after: svg("rect", { class: "after" }),
      before: svg("rect", { class: "before" }),
      arrow: svg("path", { class: "arrow" }),
      reach: svg("rect", { class: "reach" }),
      grip: svg("rect", { class: "grip", rx: 3, width: 18, height: 7 }),
    };
    const name = `Probability of label ${named(label)} before the step`;
    const range = { "aria-orientation": "vertical", "aria-valuemin": 0, "aria-valuemax": 1 };
    parts.slider = svg("g", { role: "slider", tabindex: 0, "aria-label": name, ...range }, ...Object.values(parts));
    parts.numbers = [svg("text", { class: "number" }), svg("text", { class: "number outcome" })];
    parts.numbers.forEach((number, row) => set(number, { y: 18 + 18 * row, "text-anchor": "middle" }));
    return parts;
  };

  /** The drawing: axis, bars, numbers under them, threshold. */
  const makeDrawing = (id, count) => {
    const bars = Array.from({ length: count }, (_, label) => makeBar(label));
    const ticks = TICKS.map((value) => {
      const text = svg("text", { "text-anchor": "end", x: EDGE.left - 9, y: 4 }, value.toFixed(1));
      return svg("g", { class: "tick" }, svg("line", { x1: EDGE.left - 4, x2: EDGE.left }), text);
    });
    const heads = ["before", "after"].map((word, row) => svg("text", { class: "number", y: 18 + 18 * row }, word));
    const table = svg("g", { "aria-hidden": "true" }, ...heads, ...bars.flatMap((bar) => bar.numbers));
    const axis = svg("path", { class: "axis" });
    const quantity = svg("text", { class: "quantity", y: 13 }, "probability");
    const line = svg("line", { class: "threshold" });
    const caption = svg("text", { class: "threshold-value", "text-anchor": "end" });
    const stripes = svg("path", { d: "M-2 2 2 -2M0 8 8 0M6 10 10 6", class: "stripe" });
    const hatch = svg("pattern", { id: `${id}-hatch`, width: 8, height: 8, patternUnits: "userSpaceOnUse" }, stripes);
    const drawing = svg(
      "svg",
      { role: "group", "aria-label": `Probabilities of ${count} labels before and after the step` },
      svg("defs", {}, hatch),
      svg("g", { "aria-hidden": "true" }, quantity, ...ticks, axis),
      svg("g", {}, ...bars.map((bar) => bar.slider)),
      svg("g", { "aria-hidden": "true", class: "over" }, line, caption),
      table,
    );
    return { drawing, bars, ticks, table, axis, line, caption, hatched: `url(#${id}-hatch)` };
  };

  /** The key to the drawing. */
  const makeKey = () => {
    const kinds = [
      ["before", "before"],
      ["rises", "after, rises ▲"],
      ["falls", "after, falls ▼"],
      ["pushed", "after, pushed down"],
      ["line", "threshold τ(s)"],
    ];
    const entry = ([kind, words]) => html("li", {}, html("span", { class: `swatch ${kind}` }), words);
    return html("ul", { class: "key", "aria-label": "Key" }, ...kinds.map(entry));
  };

  /** One button for each label, under its bar. */
  const makeChoice = (id, count) => {
    const buttons = Array.from({ length: count }, (_, label) =>
      html("input", { type: "radio", name: `${id}-label`, value: label, autocomplete: "off" }),
    );
    const labels = buttons.map((button, label) => html("label", {}, html("span", {}, named(label)), button));
    const name = html("p", { id: `${id}-choice` }, "Label to push down");
    const group = { class: "choice", role: "radiogroup", "aria-labelledby": `${id}-choice` };
    return { choice: html("div", group, html("div", { class: "labels" }, ...labels), name), buttons };
  };

  /** The slider of the step and the way back. */
  const makeStep = (id) => {
    const range = { type: "range", min: 0, max: PLACES, step: 1, autocomplete: "off" };
    const slider = html("input", { ...range, id: `${id}-step` });
    const value = html("output", { for: `${id}-step`, "aria-live": "off" });
    const reset = html("button", { type: "button" }, "Reset");
    const label = html("label", { for: `${id}-step` }, "Step ", html("i", {}, "s"));
    return { row: html("div", { class: "step" }, label, slider, value, reset), slider, value, reset };
  };

  /** The words under the drawing that hold for the live figure alone. */
  const makeHelp = () =>
    html(
      "p",
      { class: "explorable-help" },
      "Here the figure can be moved. Drag the grip of an outlined bar, or go to the bar with the Tab key and use the " +
        "arrow keys (with Shift for larger moves); the other bars keep their proportions. Choose the label that is " +
        "pushed down under its bar, and the step with the slider. Reset goes back to the state of the caption.",
    );

  // The live figure --------------------------------------------------------------------------------------------------

  /** Where things are, for a figure this many pixels wide. */
  const measure = (width, count) => {
    const plot = within(210, 280, Math.round(width * 0.46));
    const slot = (width - EDGE.left - EDGE.right) / count;
    return {
      width,
      plot,
      slot,
      base: EDGE.top + plot,
      bar: Math.min(0.72 * slot, 52),
      level: (value) => EDGE.top + plot * (1 - value),
      middle: (label) => EDGE.left + slot * (label + 0.5),
    };
  };

  /** Put one bar where its probabilities say. */
  const drawBar = (bar, { base, level, bar: width, slot }, { middle, before, after, direction, hatched }) => {
    const top = level(Math.max(before, after)) - 8;
    const span = (value) => ({ y: level(value), height: base - level(value) });
    const low = Math.min(base, level(before) + 12);
    set(bar.slider, {
      class: `bar ${fate(direction)}${hatched ? " pushed" : ""}`,
      "aria-valuenow": before,
      "aria-valuetext": `${fixed(before)}; after ${fixed(after)}, ${hatched ? "pushed down" : fate(direction)}`,
    });
    set(bar.before, { x: middle - width / 2, width, ...span(before) });
    set(bar.after, { x: middle - 0.32 * width, width: 0.64 * width, ...span(after) });
    bar.after.style.fill = hatched;
    set(bar.reach, { x: middle - slot / 2, y: low - 44, width: slot, height: 44 });
    set(bar.grip, { x: middle - 9, y: level(before) - 3.5 });
    const tip = direction > 0 ? `M-5 0h10l-5 -8z` : `M-5 -8h10l-5 8z`;
    set(bar.arrow, { d: direction === 0 ? "" : tip, transform: `translate(${middle} ${top})` });
    bar.numbers.forEach((number, row) => {
      number.setAttribute("x", middle);
      number.textContent = fixed(row ? after : before);
    });
    bar.numbers[1].setAttribute("class", `number outcome ${fate(direction)}`);
  };

  /** Draw the threshold; below zero its line lies just under the bars, and its value above the last of them. */
  const drawThreshold = ({ line, caption }, { width, base, slot, level }, threshold, tops) => {
    const y = threshold < 0 ? base + 4 : level(threshold);
    const covered = tops.slice(-Math.ceil(120 / slot));
    set(line, { x1: EDGE.left, x2: width - EDGE.right, y1: y, y2: y });
    set(caption, { x: width - EDGE.right, y: threshold < 0 ? level(Math.max(...covered)) - 24 : y - 6 });
    caption.textContent = `τ(s) = ${shown(threshold)}${threshold < 0 ? " < 0" : ""}`;
  };

  /** Bring everything that is seen into agreement with a state. */
  const draw = (view, state) => {
    const { p, y, s } = state;
    const outcome = compute(p, y, s);
    const place = measure(view.root.clientWidth || 592, p.length);
    const { drawing, bars, ticks, axis, table, hatched } = view.picture;
    const height = place.base + EDGE.bottom;
    const tops = p.map((value, label) => Math.max(value, outcome.after[label]));
    set(drawing, { viewBox: `0 0 ${place.width} ${height}`, height });
    ticks.forEach((tick, index) => tick.setAttribute("transform", `translate(0 ${place.level(TICKS[index])})`));
    set(axis, { d: `M${EDGE.left} ${EDGE.top}V${place.base}H${place.width - EDGE.right}` });
    set(table, { transform: `translate(0 ${place.base})` });
    bars.forEach((bar, label) => {
      drawBar(bar, place, {
        middle: place.middle(label),
        before: p[label],
        after: outcome.after[label],
        direction: outcome.directions[label],
        hatched: label === y ? hatched : "",
      });
    });
    drawThreshold(view.picture, place, outcome.threshold, tops);
    view.buttons.forEach((button, label) => (button.checked = label === y));
    view.step.slider.value = placeOf(s);
    view.step.slider.setAttribute("aria-valuetext", `${s}`);
    view.step.value.textContent = `${s}`;
    view.readout.replaceChildren(
      ...readings(state, outcome).map(([name, value]) => html("div", {}, html("dt", {}, name), html("dd", {}, value))),
    );
    Object.assign(view.root.dataset, { p: JSON.stringify(p), y, s, threshold: outcome.threshold });
    Object.assign(view.root.dataset, { after: JSON.stringify(outcome.after), rising: JSON.stringify(outcome.rising) });
  };

  /** Say what has become of the last change, once the reader pauses. */
  const announce = (view) => {
    clearTimeout(view.waiting);
    const { p, y, s } = view.state;
    view.waiting = setTimeout(() => (view.status.textContent = account(view.state, compute(p, y, s))), PAUSE);
  };

  /** Follow a pointer that took hold of a bar until it lets go. */
  const follow = (view, label, event, change) => {
    const { p } = view.state;
    const pixels = measure(view.root.clientWidth, p.length).plot;
    const { slider } = view.picture.bars[label];
    const move = (now) => {
      if (now.pointerId !== event.pointerId) return;
      const value = p[label] + (event.clientY - now.clientY) / pixels;
      change({ p: withBar(p, label, Number(value.toFixed(3))) });
    };
    const leave = (now) => {
      if (now.pointerId !== event.pointerId) return;
      slider.removeEventListener("pointermove", move);
      slider.removeEventListener("lostpointercapture", leave);
    };
    event.target.setPointerCapture(event.pointerId);
    slider.addEventListener("pointermove", move);
    slider.addEventListener("lostpointercapture", leave);
  };

  /** Let the reader act on one bar, by pointer and by keyboard. */
  const attend = (view, label, change) => {
    const { slider, before, after, reach } = view.picture.bars[label];
    // Chromium follows no touch-action of shapes inside a drawing; what a finger does near the grip is claimed here.
    reach.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
    slider.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || (event.pointerType === "touch" && [before, after].includes(event.target))) return;
      event.preventDefault();
      slider.focus({ preventScroll: true });
      follow(view, label, event, change);
    });
    slider.addEventListener("keydown", (event) => {
      const { p } = view.state;
      const stride = STRIDES[event.key] * (event.shiftKey && event.key.startsWith("Arrow") ? 10 : 1);
      const value = { Home: LEAST, End: MOST }[event.key] ?? p[label] + stride;
      if (Number.isNaN(value) || event.ctrlKey || event.altKey || event.metaKey) return;
      event.preventDefault();
      change({ p: withBar(p, label, value) });
    });
  };

  /** Build the live figure, hide the static one behind it; nothing happens to the page if the figure is missing. */
  const mount = (place) => {
    const figure = document.getElementById(place.dataset.fallback);
    if (!figure || figures[figure.id]) return;
    const start = { p: JSON.parse(place.dataset.p), y: Number(place.dataset.y), s: Number(place.dataset.s) };
    const count = start.p.length;
    const { choice, buttons } = makeChoice(figure.id, count);
    const view = { picture: makeDrawing(figure.id, count), step: makeStep(figure.id), buttons, state: start };
    view.readout = html("dl");
    view.status = html("p", { class: "explorable-status", role: "status" });
    const parts = [makeKey(), view.picture.drawing, choice, view.step.row, view.readout, view.status];
    view.root = html("div", { class: "explorable explorable-squeezing", style: `--labels: ${count}` }, ...parts);
    const change = (part) => {
      const next = structuredClone({ ...view.state, ...part });
      check(next.p, next.y, next.s);
      if (next.p.length !== count) throw new RangeError(`p: expected ${count} labels, got ${next.p.length}`);
      view.state = next;
      draw(view, next);
      announce(view);
    };
    view.picture.bars.forEach((_, label) => attend(view, label, change));
    buttons.forEach((button, label) => button.addEventListener("change", () => change({ y: label })));
    view.step.slider.addEventListener("input", () => change({ s: stepAt(Number(view.step.slider.value)) }));
    view.step.reset.addEventListener("click", () => change(start));
    draw(view, start);
    figure.classList.add("explorable-live");
    figure.prepend(view.root);
    figure.querySelector("figcaption")?.append(makeHelp());
    new ResizeObserver(() => draw(view, view.state)).observe(view.root);
    addEventListener("pageshow", () => draw(view, view.state)); // a restored page may have put old values back
    figures[figure.id] = { set: change, state: () => structuredClone(view.state) };
  };

  /** The live figures of this page, by the name of the figure they replace. */
  const figures = {};
  window.ldynExplorables = { ...window.ldynExplorables, squeezing: { compute, withBar, stepAt, placeOf, figures } };
  document.querySelectorAll('[data-explorable="squeezing"]').forEach(mount);
})();
