// The page of the error browser: it draws what Python sends, and sends back what a person clicks.
// Texts and labels of users become text nodes or are drawn on a canvas; nothing is parsed as HTML.

const FONT = "11px sans-serif"; // of the matrix
const LABELLED = 40; // labels up to which every row and column of the matrix has its name

/** Make an element; strings among the children become text nodes. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

/** A text of a user: its direction is its own. */
const words = (text, className = "") => make("span", { dir: "auto", className }, text);

const choice = (values, properties = {}) =>
  make("select", properties, ...values.map((value) => make("option", { value }, value)));

const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

function render({ model, el }) {
  const overview = model.get("_overview");
  const root = make("div", { className: "cascade-browser" });
  root.dataset.lmSuppressShortcuts = "true"; // keys typed here are no commands of JupyterLab
  const listeners = [];
  const on = (name, listener) => {
    model.on(`change:${name}`, listener);
    listeners.push([`change:${name}`, listener]);
  };
  const set = (values) => {
    for (const [name, value] of Object.entries(values)) model.set(name, value);
    model.save_changes();
  };
  const ask = (command) => set({ _command: { ...command, n: Date.now() + Math.random() } });
  const select = (selection) => set({ selection });
  const any = { on, set, ask, select, model, overview };

  const panels = { Matrix: matrixPanel(any), Flow: flowPanel(any), Slices: slicesPanel(any) };
  const tabs = make("div", { className: "cb-tabs", role: "tablist" });
  const open = (name) => {
    for (const [other, panel] of Object.entries(panels)) panel.element.hidden = other !== name;
    for (const tab of tabs.children) tab.setAttribute("aria-selected", String(tab.textContent === name));
    panels[name].open?.();
  };
  for (const name of Object.keys(panels)) {
    const tab = make("button", { type: "button", onclick: () => open(name) }, name);
    tab.setAttribute("role", "tab");
    tabs.append(tab);
  }
  const everything = make("button", { type: "button", onclick: () => select({}) }, "All texts");
  const left = make("div", { className: "cb-left" }, make("div", { className: "cb-line" }, tabs, everything));
  left.append(...Object.values(panels).map((panel) => panel.element));
  root.append(left, textsPanel(any));
  el.replaceChildren(root);

  // The colours are those of the page; a canvas needs them as numbers. They change with the theme.
  const paint = () => {
    const dark = isDark(root);
    root.classList.toggle("cb-dark", dark);
    panels.Matrix.draw();
  };
  const observer = new MutationObserver(paint);
  for (const node of [document.documentElement, document.body]) observer.observe(node, { attributes: true });
  open("Matrix");
  requestAnimationFrame(paint);
  return () => {
    observer.disconnect();
    for (const [event, listener] of listeners) model.off(event, listener);
  };
}

/** Whether the page's text is light. Any way of writing a colour is understood, because a canvas reads it. */
function isDark(element) {
  const context = make("canvas", { width: 1, height: 1 }).getContext("2d");
  context.fillStyle = getComputedStyle(element).color;
  context.fillRect(0, 0, 1, 1);
  const [red, green, blue] = context.getImageData(0, 0, 1, 1).data;
  return 0.299 * red + 0.587 * green + 0.114 * blue > 140;
}

function matrixPanel({ on, select, model, overview }) {
  const { labels, shown_labels: names, cells, in_scope: inScope } = overview;
  const n = labels.length;
  const counts = new Map();
  let most = 1;
  for (let k = 0; k < cells.length; k += 3) {
    counts.set(cells[k] * n + cells[k + 1], cells[k + 2]);
    most = Math.max(most, cells[k + 2]);
  }
  const ruler = make("canvas").getContext("2d");
  ruler.font = FONT;
  const longest = Math.max(0, ...names.map((name) => ruler.measureText(name).width));
  const margin = n <= LABELLED ? Math.ceil(Math.min(130, longest + 12)) : 14;
  const size = n <= LABELLED ? Math.min(26, Math.max(13, 440 / n)) : n <= 300 ? Math.max(4, Math.floor(604 / n)) : 1200 / n;
  const canvas = make("canvas", { tabIndex: 0, className: "cb-matrix" });
  canvas.setAttribute("role", "img");
  canvas.setAttribute(
    "aria-label",
    "Confusion matrix: true labels in rows, predicted labels in columns. Arrow keys move, Enter shows the texts.",
  );
  const side = margin + n * size + 2;
  canvas.style.width = canvas.style.height = `${side}px`;
  const hint = make("div", { className: "cb-hint" });
  hint.setAttribute("aria-live", "polite");
  let at = null; // row and column under the pointer, or of the arrow keys

  const draw = () => {
    const scale = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(side * scale)) canvas.width = canvas.height = Math.round(side * scale);
    const context = canvas.getContext("2d");
    const dark = canvas.closest(".cb-dark") !== null;
    const ink = dark ? "230,237,243" : "28,35,48";
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, side, side);
    context.translate(margin, margin);
    const { label, predicted } = model.get("selection");
    const [row, column] = [labels.indexOf(label), labels.indexOf(predicted)];
    context.fillStyle = `rgba(${ink},0.09)`; // the chosen row and column, and those under the pointer
    for (const [i, j] of [[row, column], at ?? [-1, -1]]) {
      if (i >= 0) context.fillRect(0, i * size, n * size, size);
      if (j >= 0) context.fillRect(j * size, 0, size, n * size);
    }
    context.strokeStyle = `rgba(${ink},0.13)`;
    context.lineWidth = 1;
    const step = n <= LABELLED ? 1 : 10;
    context.beginPath();
    for (let i = 0; i <= n; i += step) {
      context.moveTo(i * size, 0);
      context.lineTo(i * size, n * size);
      context.moveTo(0, i * size);
      context.lineTo(n * size, i * size);
    }
    context.stroke();
    context.strokeStyle = `rgba(${ink},0.5)`;
    context.strokeRect(0, 0, n * size, n * size);
    const smallest = Math.max(size - 0.5, 2);
    for (const [cell, value] of counts) {
      const [i, j] = [Math.floor(cell / n), cell % n];
      const strength = 0.5 + 0.5 * (Math.log1p(value) / Math.log1p(most));
      const right = dark ? "125,170,210" : "80,125,170";
      const wrong = inScope[i] && inScope[j] ? (dark ? "176,148,240" : "93,67,144") : dark ? "255,140,120" : "176,48,79";
      context.fillStyle = `rgba(${i === j ? right : wrong},${strength})`;
      context.fillRect(j * size + 0.25, i * size + 0.25, smallest, smallest);
      if (size >= 20) {
        context.fillStyle = dark ? "#0d1117" : strength > 0.6 ? "#fff" : "#111";
        context.font = `${value > 999 ? 8 : 11}px sans-serif`;
        context.textAlign = "center";
        context.textBaseline = "middle";
        context.fillText(value, (j + 0.5) * size, (i + 0.5) * size);
      }
    }
    if (row >= 0 && column >= 0) {
      context.strokeStyle = dark ? "#fff" : "#000";
      context.lineWidth = 2;
      context.strokeRect(column * size - 1.5, row * size - 1.5, size + 3, size + 3);
    }
    if (n <= LABELLED) {
      context.fillStyle = `rgb(${ink})`;
      context.font = FONT;
      context.textBaseline = "middle";
      for (let i = 0; i < n; i++) {
        context.textAlign = "right";
        context.fillText(fit(context, names[i], margin - 8), -6, (i + 0.5) * size);
        context.save();
        context.translate((i + 0.5) * size, -6);
        context.rotate(-Math.PI / 2);
        context.textAlign = "left";
        context.fillText(fit(context, names[i], margin - 8), 0, 0);
        context.restore();
      }
    }
  };

  /** The cell at a place on the canvas. In small cells, the nearest one that is not 0, if one is near. */
  const find = (event) => {
    const box = canvas.getBoundingClientRect();
    const y = (event.clientY - box.top - margin) / size;
    const x = (event.clientX - box.left - margin) / size;
    const [i, j] = [Math.floor(y), Math.floor(x)];
    if (i >= n || j >= n || (i < 0 && j < 0)) return null;
    if (i < 0 || j < 0) return [i, j];
    if (size >= 8 || counts.has(i * n + j)) return [i, j];
    const reach = Math.ceil(4 / size);
    let best = [i, j];
    let least = Infinity;
    for (let a = Math.max(0, i - reach); a <= Math.min(n - 1, i + reach); a++) {
      for (let b = Math.max(0, j - reach); b <= Math.min(n - 1, j + reach); b++) {
        const distance = (a + 0.5 - y) ** 2 + (b + 0.5 - x) ** 2;
        if (counts.has(a * n + b) && distance < least) [best, least] = [[a, b], distance];
      }
    }
    return best;
  };
  const point = (cell) => {
    if (String(cell) !== String(at)) {
      at = cell;
      describe();
      draw();
    }
  };
  const describe = () => {
    const [i, j] = at ?? [-1, -1];
    if (i < 0 && j < 0) {
      hint.replaceChildren("Rows: true labels. Columns: predicted labels. Click a cell to see its texts.");
      return;
    }
    const value = i >= 0 && j >= 0 ? `: ${count(counts.get(i * n + j) ?? 0, "text")}` : "";
    hint.replaceChildren(words(names[i] ?? "any label"), " → ", words(names[j] ?? "any label"), value);
  };
  const choose = (cell) => {
    const conditions = {};
    if (cell[0] >= 0) conditions.label = labels[cell[0]];
    if (cell[1] >= 0) conditions.predicted = labels[cell[1]];
    select(conditions);
  };
  canvas.onmousemove = (event) => point(find(event));
  canvas.onmouseleave = () => point(null);
  canvas.onclick = (event) => {
    const cell = find(event);
    if (cell) choose(cell);
  };
  canvas.onkeydown = (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (move) point(at ? [0, 1].map((k) => Math.min(n - 1, Math.max(0, at[k] + move[k]))) : [0, 0]);
    else if (event.key === "Enter" && at) choose(at);
    else return;
    event.preventDefault();
    event.stopPropagation();
  };

  const picks = ["label", "predicted"].map((name) => {
    const pick = make("select", {}, make("option", { value: "" }, "any"));
    pick.append(...names.map((label, k) => make("option", { value: String(k) }, label)));
    pick.onchange = () => {
      const { label, predicted } = model.get("selection");
      const conditions = { label, predicted, [name]: labels[Number(pick.value)] };
      if (pick.value === "") delete conditions[name];
      select(Object.fromEntries(Object.entries(conditions).filter(([, value]) => value !== undefined)));
    };
    return pick;
  });
  const follow = () => {
    const { label, predicted } = model.get("selection");
    [label, predicted].forEach((value, k) => {
      picks[k].value = value === undefined ? "" : String(labels.indexOf(value));
    });
    draw();
  };
  on("selection", follow);
  const confusions = make("div", { className: "cb-columns" });
  for (const [title, both] of [["A class for another", true], ["In scope or not", false]]) {
    const list = overview.confusions.filter(([i, j]) => (inScope[i] && inScope[j]) === both);
    const column = make("div", { className: "cb-list" }, make("b", {}, title), ...(list.length ? [] : ["none"]));
    for (const [i, j, value] of list) {
      const button = make("button", { type: "button", onclick: () => choose([i, j]) });
      button.append(words(names[i]), " → ", words(names[j]), `: ${value}`);
      column.append(button);
    }
    confusions.append(column);
  }
  describe();
  queueMicrotask(follow);
  const element = make(
    "div",
    {},
    make("div", { className: "cb-scroll" }, canvas),
    hint,
    make("div", { className: "cb-line" }, make("label", {}, "true ", picks[0]), make("label", {}, "predicted ", picks[1])),
    confusions,
  );
  return { element, draw };
}

/** Cut a label to a width on a canvas. */
function fit(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  const characters = [...text];
  while (characters.length > 1 && context.measureText(`${characters.join("")}…`).width > width) characters.pop();
  return `${characters.join("")}…`;
}

function flowPanel({ select, overview }) {
  const element = make("div", { className: "cb-flow" });
  for (const stage of new Set(overview.bands.map((band) => band.stage))) {
    const bands = overview.bands.filter((band) => band.stage === stage && band.n);
    const reached = bands.reduce((sum, band) => sum + band.n, 0);
    element.append(make("div", {}, make("b", {}, words(stage)), `: ${count(reached, "text")}`));
    const bar = make("div", { className: "cb-bar" });
    bar.style.width = `${(100 * reached) / overview.n}%`;
    const list = make("div", { className: "cb-list" });
    for (const band of bands) {
      const share = `${((100 * band.n) / overview.n).toFixed(1)}%`;
      const onclick = () => select(band.conditions);
      const text = `${band.text}: ${band.n.toLocaleString("en")} (${share})`;
      const part = make("button", { type: "button", title: text, onclick }, band.n / overview.n > 0.05 ? String(band.n) : "");
      part.setAttribute("aria-label", text);
      part.className = band.is_error ? "cb-band cb-error" : "cb-band";
      part.style.flexGrow = String(band.n);
      part.style.backgroundColor = band.color;
      part.style.color = band.ink;
      bar.append(part);
      const box = make("span", { className: band.is_error ? "cb-box cb-error" : "cb-box" });
      box.style.backgroundColor = band.color;
      list.append(make("button", { type: "button", onclick }, box, text));
    }
    element.append(bar, list);
  }
  return { element };
}

function slicesPanel({ on, ask, select, model }) {
  const element = make("div", { className: "cb-list" });
  const show = () => {
    const slices = model.get("_slices");
    element.replaceChildren(make("b", {}, "Slices: groups of texts, the clearest difference first"));
    if (!slices.length) element.append("computing the slices …");
    for (const [rule, name, n, errors] of slices) {
      const button = make("button", { type: "button", onclick: () => select({ rule }) });
      button.append(words(name), `: ${errors} of ${count(n, "text")} wrong (${((100 * errors) / n).toFixed(1)}%)`);
      element.append(button);
    }
  };
  on("_slices", show);
  show();
  return { element, open: () => model.get("_slices").length || ask({ do: "slices" }) };
}

function textsPanel({ on, set, ask, model, overview }) {
  const ticked = new Set();
  const title = make("div", { className: "cb-title", dir: "ltr" }); // Python isolates the labels in it
  title.setAttribute("aria-live", "polite");
  const search = make("input", { type: "search", placeholder: "search in texts, labels, ids" });
  search.setAttribute("aria-label", search.placeholder);
  let waiting;
  search.oninput = () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => set({ search: search.value }), 150);
  };
  const shown = choice(overview.shown);
  shown.onchange = () => set({ shown: shown.value });
  const order = choice(overview.orders);
  order.onchange = () => set({ order: order.value });
  const back = make("button", { type: "button", title: "previous page" }, "‹");
  const forward = make("button", { type: "button", title: "next page" }, "›");
  back.onclick = () => set({ page: model.get("_view").page - 1 });
  forward.onclick = () => set({ page: model.get("_view").page + 1 });
  const pages = make("span");
  const list = make("div", { className: "cb-texts" });
  const status = make("div", { className: "cb-status" });
  status.setAttribute("role", "status");

  const datalist = make("datalist", { id: `cb-labels-${Math.random().toString(36).slice(2)}` });
  datalist.append(...overview.labels.map((value) => make("option", { value })));
  const all = make("input", { type: "checkbox" });
  all.onchange = () => {
    for (const row of model.get("_view").rows) ticked[all.checked ? "add" : "delete"](row.id);
    show();
  };
  const action = choice(overview.actions);
  const corrected = make("input", { type: "text", placeholder: "right label (else: predicted)" });
  corrected.setAttribute("list", datalist.id);
  action.onchange = () => (corrected.hidden = action.value !== "relabel");
  const finish = (command) => {
    if (!ticked.size) {
      say({ text: "tick a text first", wrong: true });
      return;
    }
    ask({ ...command, ids: [...ticked] });
  };
  const mark = make("button", { type: "button", className: "cb-mark" }, "Mark");
  mark.onclick = () => {
    const label = action.value === "relabel" ? corrected.value : "";
    finish({ do: "mark", action: action.value, corrected_label: label });
  };
  const unmark = make("button", { type: "button" }, "Unmark");
  unmark.onclick = () => finish({ do: "unmark" });
  const path = make("input", { type: "text", value: "marks.csv", className: "cb-path" });
  path.setAttribute("aria-label", "file to write");
  const overwrite = make("input", { type: "checkbox" });
  const write = make("button", { type: "button", className: "cb-write" }, "Write");
  write.onclick = () => ask({ do: "write", path: path.value, overwrite: overwrite.checked });

  const say = ({ text = "", wrong = false }) => {
    status.replaceChildren(text);
    status.classList.toggle("cb-wrong", wrong);
  };
  const similar = new Map(); // the open rows that wait for their similar texts
  const row = (text) => {
    const tick = make("input", { type: "checkbox", checked: ticked.has(text.id) });
    tick.setAttribute("aria-label", "tick this text");
    tick.onchange = () => ticked[tick.checked ? "add" : "delete"](text.id);
    const box = make("span", { className: text.right ? "cb-box" : "cb-box cb-error", title: text.outcome });
    box.style.backgroundColor = text.color;
    const facts = make("div", { className: "cb-facts", dir: "ltr" }, box, `${text.outcome}  true `, words(text.label, "cb-label"));
    facts.append("  predicted ", words(text.predicted, "cb-label"));
    for (const [name, says, reached] of text.stages) {
      const stage = make("span", { className: "cb-stage" }, words(name), `: ${says}`);
      if (!reached) {
        stage.classList.add("cb-shadow");
        stage.title = "an earlier stage had decided already";
      }
      facts.append(stage);
    }
    const detail = make("div", { className: "cb-similar" });
    const details = make("details", {}, make("summary", {}, "similar texts"), detail);
    details.ontoggle = () => {
      if (!details.open) return;
      similar.set(text.id, detail);
      ask({ do: "similar", ids: [text.id] });
    };
    const body = make("div", { className: "cb-body" });
    if (text.action) {
      const note = make("span", { className: "cb-action" }, text.action);
      if (text.corrected_label) note.append(": ", words(text.corrected_label));
      body.append(note);
    }
    body.append(...text.texts.map((part) => make("div", { className: "cb-text", dir: "auto" }, part)), facts, details);
    return make("div", { className: "cb-row" }, tick, body);
  };
  const show = () => {
    const view = model.get("_view");
    similar.clear();
    title.replaceChildren(view.title, `: ${count(view.n, "text")}`);
    list.replaceChildren(...view.rows.map(row));
    if (!view.n) list.append("No text meets all of this.");
    list.dataset.title = view.title;
    pages.replaceChildren(` page ${view.page + 1} of ${view.n_pages} `);
    back.disabled = view.page === 0;
    forward.disabled = view.page + 1 >= view.n_pages;
    all.checked = view.rows.length > 0 && view.rows.every((text) => ticked.has(text.id));
    write.replaceChildren(`Write ${count(view.n_marks, "mark")}`);
  };
  on("_view", show);
  on("selection", () => {
    ticked.clear(); // the texts that follow are others
    list.scrollTop = 0;
  });
  on("_similar", () => {
    const { id, rows, by } = model.get("_similar");
    const detail = similar.get(id);
    if (!detail) return;
    detail.replaceChildren(
      ...rows.map(([text, label, predicted, cosine]) => {
        const line = make("div", {}, `${cosine.toFixed(2)} `, words(text), " (", words(label, "cb-label"));
        line.append(...(label === predicted ? [")"] : [" → ", words(predicted, "cb-label"), ")"]));
        return line;
      }),
      make("i", {}, rows.length ? `cosine of ${by === "features" ? "the last stage's features" : "n-grams of characters"}` : "none"),
    );
  });
  on("_status", () => {
    const now = model.get("_status");
    say(now);
    if (now.has_marked) {
      ticked.clear();
      show();
    }
  });
  for (const [name, control] of [["search", search], ["shown", shown], ["order", order]]) {
    const follow = () => {
      if (control.value !== model.get(name)) control.value = model.get(name);
    };
    on(name, follow);
    follow();
  }
  show();
  return make(
    "div",
    { className: "cb-right" },
    title,
    make("div", { className: "cb-line" }, search, make("label", {}, "show ", shown), make("label", {}, "order ", order)),
    make("div", { className: "cb-line" }, make("label", {}, all, " all on this page"), action, corrected, mark, unmark, datalist),
    list,
    make("div", { className: "cb-line" }, back, pages, forward),
    make("div", { className: "cb-line" }, path, make("label", {}, overwrite, " overwrite"), write),
    status,
  );
}

export default { render };
