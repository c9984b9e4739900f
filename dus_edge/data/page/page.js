
(() => {
  "use strict";

  // What Python predicted; this script looks up and draws, it predicts nothing.
  const data = JSON.parse(document.getElementById("data").textContent);
  const { devices, presets, contexts, families, memory, cells, speeds, reasons } = data;
  const ALL_LAYERS = data.layers + 1; // -ngl counts the output too
  const PARTS = [
    ["weights", "Weights"],
    ["kv", "KV cache"],
    ["compute", "Compute"],
    ["overhead", "Overhead"],
  ];
  const SPEED_KEYS = ["tg", "tgLow", "tgHigh", "pp", "ppLow", "ppHigh"];
  const NARROW = 560; // pixels of a chart
  const MOST_BARS = 30;

  const byId = (id) => document.getElementById(id);
  const now = { device: 0, preset: 0, context: 0, compare: "family" };
  const order = { key: "tg", up: false };
  const widths = {}; // of the boxes of charts, in pixels

  /* Looking up */

  function speedAt(index) {
    if (index < 0) return null;
    const values = speeds.slice(index * 6, index * 6 + 6);
    return Object.fromEntries(SPEED_KEYS.map((key, i) => [key, values[i]]));
  }

  function lookUp(device, preset, context) {
    const d = devices[device];
    const parts = [...memory[d.backend][preset][context], d.overhead[presets[preset].runtime]];
    const total = parts.reduce((sum, n) => sum + n, 0);
    const at = ((device * presets.length + preset) * contexts.length + context) * 3;
    const [layers, empty, full] = cells.slice(at, at + 3);
    return {
      parts,
      total,
      usable: d.usable,
      spare: d.usable - total,
      fits: total <= d.usable,
      close: Math.abs(d.usable - total) < data.unsure * d.usable,
      layers,
      splits: presets[preset].runtime === "llama.cpp",
      empty: speedAt(empty),
      full: speedAt(full),
      why: empty < 0 ? reasons[-empty - 1] : "",
    };
  }

  /* Saying */

  const grouped = new Intl.NumberFormat("en-US");
  const count = (n) => grouped.format(n);

  function bytes(n) {
    const size = Math.abs(n);
    if (size < 2 ** 30) return `${Math.round(size / 2 ** 20)} MiB`;
    const gib = size / 2 ** 30;
    return `${gib.toFixed(gib < 10 ? 2 : 1)} GiB`;
  }

  const gib = (n) => (n / 2 ** 30).toFixed(1);
  const rate = (x) => (x >= 100 ? grouped.format(Math.round(x)) : x.toFixed(1));
  const span = (low, high) => `${rate(low)}–${rate(high)}`;
  const short = (n) => (n >= 1024 ? `${n / 1024}k` : `${n}`);

  function state(cell) {
    if (cell.fits) return "whole";
    return cell.layers ? "part" : "none";
  }

  function fitWords(cell) {
    const close = cell.close ? "close: " : "";
    if (cell.fits) return `${close}whole`;
    if (cell.layers) return `${close}-ngl ${cell.layers} of ${ALL_LAYERS}`;
    return cell.splits ? "not one layer" : `${close}no`;
  }

  function fitShort(cell) {
    if (cell.fits) return "whole";
    return cell.layers ? `-ngl ${cell.layers}` : "no";
  }

  function fitMore(cell) {
    const close = cell.close ? ["close"] : [];
    return [...close, ...(cell.fits || !cell.layers ? [] : [`of ${ALL_LAYERS}`])].join(", ");
  }

  function verdictWords(cell) {
    if (cell.fits) {
      return `${cell.close ? "Fits, but close:" : "Fits,"} ${bytes(cell.spare)} to spare`;
    }
    const close = cell.close ? ", by a little" : "";
    if (cell.layers) return `Does not fit whole${close}: -ngl ${cell.layers} of ${ALL_LAYERS}`;
    return `Does not fit${close}`;
  }

  function detailWords(cell, d) {
    const close = cell.close
      ? " What the system itself takes is not known to this precision: it may turn out otherwise."
      : "";
    if (cell.fits) {
      return `Takes ${bytes(cell.total)} of the ${bytes(cell.usable)} that ${d.system} leaves free.${close}`;
    }
    const none = cell.splits
      ? " Not even one layer goes on the device."
      : " Parts left on the CPU are predicted for GGUF files only.";
    const layers = cell.layers
      ? ` ${cell.layers} of ${ALL_LAYERS} layers go on the device, the output counted as one.`
      : none;
    return (
      `Whole it takes ${bytes(cell.total)}, and ${d.system} leaves ${bytes(cell.usable)} free: ` +
      `${bytes(cell.spare)} are missing.${layers}${close}`
    );
  }

  function betterWords() {
    const wholePresets = presets
      .map((preset, i) => [preset, lookUp(now.device, i, now.context)])
      .filter(([, cell]) => cell.fits && cell.splits)
      .sort(([, a], [, b]) => b.parts[0] - a.parts[0]);
    const wholeContexts = contexts.filter((_, i) => lookUp(now.device, now.preset, i).fits);
    const preset = wholePresets.length
      ? `Largest GGUF preset on this page that fits whole at this context: ${wholePresets[0][0].label}. `
      : "No GGUF preset on this page fits whole at this context. ";
    const longest = wholeContexts.length
      ? `Longest context with this preset: ${count(Math.max(...wholeContexts))}.`
      : "";
    return preset + longest;
  }

  /* Building */

  function html(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  function svg(tag, attributes = {}, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    element.append(...children);
    return element;
  }

  const text = (x, y, words, attributes = {}) => svg("text", { x, y, ...attributes }, words);
  const line = (x1, y1, x2, y2, name) => svg("line", { x1, y1, x2, y2, class: name });

  function picture(width, height, label) {
    return svg("svg", {
      viewBox: `0 0 ${width} ${height}`,
      height,
      role: "img",
      "aria-label": label,
    });
  }

  const ruler = document.createElement("canvas").getContext("2d");
  const typeface = getComputedStyle(document.body).fontFamily;

  function widthOf(words, font) {
    ruler.font = `${font} ${typeface}`;
    return ruler.measureText(words).width;
  }

  function figures(head, rows) {
    const table = html(
      "table",
      { class: "plain" },
      html("thead", {}, html("tr", {}, ...head.map((h) => html("th", { scope: "col" }, h)))),
      html(
        "tbody",
        {},
        ...rows.map(([first, ...rest]) =>
          html(
            "tr",
            {},
            html("th", { scope: "row" }, first),
            ...rest.map((value) => html("td", {}, value)),
          ),
        ),
      ),
    );
    const box = html("div", {
      class: "table-box short",
      tabindex: "0",
      role: "region",
      "aria-label": "Figures of the chart above",
    });
    box.append(table);
    return html("details", {}, html("summary", {}, "These figures as a table"), box);
  }

  function show(box, drawing, details) {
    const open = box.querySelector("details")?.open ?? false;
    box.replaceChildren(drawing, ...(details ? [details] : []));
    if (details) details.open = open;
  }

  /* Charts */

  function drawMemoryBar(cell) {
    const box = byId("memory-bar");
    const width = widths[box.id];
    const top = 24;
    const tall = 56;
    const most = Math.max(cell.total, cell.usable);
    const x = (n) => (n / most) * (width - 2) + 1;
    const said = PARTS.map(([, label], i) => `${label} ${bytes(cell.parts[i])}`).join(", ");
    const drawing = picture(
      width,
      top + tall + 4,
      `Memory: ${said}; total ${bytes(cell.total)} of ${bytes(cell.usable)} usable.`,
    );
    drawing.append(
      svg("rect", { x: 1, y: top, width: x(cell.usable) - 1, height: tall, rx: 6, class: "room" }),
    );
    let from = 0;
    PARTS.forEach(([key, label], i) => {
      const [a, b] = [x(from), x(from + cell.parts[i])];
      from += cell.parts[i];
      const fill = key === "weights" ? "var(--weights)" : `url(#hatch-${key})`;
      const bar = svg("rect", {
        x: a,
        y: top + 4,
        width: Math.max(b - a, 0.5),
        height: tall - 8,
        fill,
        class: b - a > 4 ? "segment" : "",
      });
      bar.append(svg("title", {}, `${label} ${bytes(cell.parts[i])}`));
      drawing.append(bar);
    });
    const at = x(cell.usable);
    const words = `usable ${bytes(cell.usable)}`;
    const atEnd = at > width / 2;
    drawing.append(
      line(at, top - 4, at, top + tall + 4, "halo"),
      line(at, top - 4, at, top + tall + 4, "usable"),
      text(at, top - 9, words, { class: "small strong", "text-anchor": atEnd ? "end" : "start" }),
    );
    show(box, drawing);

    const rows = PARTS.map(([key, label], i) => legendRow(key, label, bytes(cell.parts[i])));
    rows.push(
      html("li", { class: "sum" }, "Total", html("span", { class: "amount" }, bytes(cell.total))),
      html(
        "li",
        { class: "sum" },
        cell.fits ? "To spare" : "Missing",
        html("span", { class: "amount" }, bytes(cell.spare)),
      ),
    );
    byId("memory-legend").replaceChildren(...rows);
  }

  function swatch(key) {
    return svg(
      "svg",
      { class: "swatch", viewBox: "0 0 14 14", "aria-hidden": "true" },
      svg("rect", {
        width: 14,
        height: 14,
        rx: 3,
        fill: key === "weights" ? "var(--weights)" : `url(#hatch-${key})`,
      }),
    );
  }

  function legendRow(key, label, amount) {
    return html("li", {}, swatch(key), label, html("span", { class: "amount" }, amount));
  }

  /** Horizontal bars from zero, each with the whisker of its interval. */
  function drawBars(box, rows, label, details) {
    const width = widths[box.id];
    const lengths = (key) => rows.map((row) => widthOf(row[key], "bold 13px"));
    const [names, words] = [lengths("name"), lengths("words")];
    const stacked = width < NARROW || Math.max(...names) > width * 0.34;
    const layout = stacked ? stackedRows(width, names, words) : flatRows(width, names, words);
    const { left, right, pitch, bar, nameAt, wordsAt } = layout;
    const most = Math.max(...rows.map((row) => row.high), 1e-9);
    const x = (value) => left + (value / most) * (width - left - right);
    const drawing = picture(width, rows.length * pitch, label);
    if (!stacked) drawing.append(line(left, 0, left, rows.length * pitch, "axis"));
    rows.forEach((row, i) => {
      const y = i * pitch;
      const middle = y + bar;
      const strong = row.now ? "strong" : "";
      const [low, high] = [x(row.low), x(row.high)];
      // A name longer than a small screen is drawn closer.
      const close = names[i] > width ? { textLength: width, lengthAdjust: "spacingAndGlyphs" } : {};
      const how = { class: strong, ...nameAt.how, ...close };
      drawing.append(text(nameAt.x, y + nameAt.y, row.name, how));
      if (row.value !== null) {
        const end = Math.max(x(row.value) - left, 1);
        const kind = `bar${row.state === "whole" ? "" : " bar-part"}${row.now ? " now" : ""}`;
        const path = `M${low} ${middle}H${high}M${low} ${middle - 5}v10M${high} ${middle - 5}v10`;
        drawing.append(
          svg(
            "rect",
            { x: left, y: middle - 9, width: end, height: 18, rx: 2, class: kind },
            svg("title", {}, `${row.label}: ${row.words}`),
          ),
          svg("path", { d: path, class: "halo" }),
          svg("path", { d: path, class: "whisker" }),
        );
      }
      const after = wordsAt.x ?? (row.value === null ? left : high) + 8;
      const tone = row.value === null ? "soft" : strong;
      drawing.append(text(after, y + wordsAt.y, row.words, { class: tone, ...wordsAt.how }));
    });
    show(box, drawing, details);
  }

  /** Name, bar and words in one line. */
  function flatRows(width, names, words) {
    const left = Math.max(...names) + 10;
    return {
      left,
      right: Math.max(...words) + 12,
      pitch: 32,
      bar: 16,
      nameAt: { x: left - 8, y: 20.5, how: { "text-anchor": "end" } },
      wordsAt: { x: null, y: 20.5, how: {} },
    };
  }

  /** For narrow places: name and words above the bar, in two lines where one is too short. */
  function stackedRows(width, names, words) {
    const two = names.some((name, i) => name + words[i] + 16 > width);
    return {
      left: 0,
      right: 2,
      pitch: two ? 66 : 48,
      bar: two ? 48 : 30,
      nameAt: { x: 0, y: 14, how: {} },
      wordsAt: two
        ? { x: 0, y: 32, how: {} }
        : { x: width, y: 14, how: { "text-anchor": "end" } },
    };
  }

  function barOf(cell, label, isNow) {
    const speed = cell.empty;
    const where = cell.fits ? "" : `, -ngl ${cell.layers}`;
    return {
      label,
      name: isNow ? `▸ ${label}` : label,
      now: isNow,
      state: state(cell),
      value: speed ? speed.tg : null,
      low: speed ? speed.tgLow : 0,
      high: speed ? speed.tgHigh : 0,
      words: speed
        ? `${rate(speed.tg)} (${span(speed.tgLow, speed.tgHigh)})${where}`
        : cell.layers
          ? "not predicted"
          : "does not fit",
    };
  }

  function figuresOf(cells, first) {
    return figures(
      [first, "Fits", "tok/s", "80 % interval"],
      cells.map(([label, cell]) => [
        label,
        fitWords(cell),
        cell.empty ? rate(cell.empty.tg) : "not predicted",
        cell.empty ? span(cell.empty.tgLow, cell.empty.tgHigh) : "–",
      ]),
    );
  }

  function drawPresets() {
    const found = presets.map((p, i) => [p.label, lookUp(now.device, i, now.context)]);
    const rows = found.map(([label, cell], i) => barOf(cell, label, i === now.preset));
    const label = `Generation speed on ${devices[now.device].label} by preset, in tokens per second. ${rows
      .map((row) => `${row.label} ${row.words}`)
      .join("; ")}.`;
    drawBars(byId("presets-chart"), rows, label, figuresOf(found, "Preset"));
  }

  /** Sizes of memory that make no difference are one bar. */
  function merged(indexes) {
    const groups = new Map();
    for (const i of indexes) {
      const cell = lookUp(i, now.preset, now.context);
      const key = JSON.stringify([devices[i].id, cell.layers, cell.empty]);
      if (!groups.has(key)) groups.set(key, { cell, members: [] });
      groups.get(key).members.push(i);
    }
    return [...groups.values()].map(({ cell, members }) => {
      const sizes = members.map((i) => devices[i].gb).join(", ");
      const { name, label } = devices[members[0]];
      return {
        cell,
        isNow: members.includes(now.device),
        label: members.length > 1 ? `${name}, ${sizes} GB` : label,
      };
    });
  }

  const COMPARISONS = {
    family: ["Same family", (d, own) => d.family === own.family],
    memory: ["Same memory size", (d, own) => d.gb === own.gb],
    geforce: ["GeForce, desktop", (d) => d.family.endsWith("-desktop")],
    laptop: ["Laptop cards", (d) => d.family === "nvidia-laptop"],
    mac: ["Macs", (d) => d.backend === "Metal"],
    server: ["Workstation, datacenter", (d) => /pro$|datacenter$/.test(d.family)],
    all: ["Every device", () => true],
  };

  function drawDevices() {
    const own = devices[now.device];
    const [, belongs] = COMPARISONS[now.compare];
    const chosen = devices.map((_, i) => i).filter((i) => i === now.device || belongs(devices[i], own));
    const speedOf = ({ cell }) => (cell.empty ? cell.empty.tg : -1);
    const sorted = merged(chosen).sort((a, b) => speedOf(b) - speedOf(a));
    const shown = sorted.filter((row, i) => i < MOST_BARS || row.isNow);
    const rows = shown.map(({ cell, label, isNow }) => barOf(cell, label, isNow));
    const label = `Generation speed in ${presets[now.preset].label} on ${rows.length} devices, in tokens per second, fastest first. ${rows
      .map((row) => `${row.label} ${row.words}`)
      .join("; ")}.`;
    const box = byId("devices-chart");
    const details = figuresOf(shown.map(({ label: name, cell }) => [name, cell]), "Device");
    drawBars(box, rows, label, details);
    if (shown.length < sorted.length) {
      const rest = sorted.length - shown.length;
      box.append(html("p", { class: "about" }, `${rest} more stand in the table below.`));
    }
  }

  function drawContexts() {
    const box = byId("contexts-chart");
    const width = widths[box.id];
    const narrow = width < NARROW;
    const found = contexts.map((_, i) => lookUp(now.device, now.preset, i));
    const usable = found[0].usable;
    const most = Math.max(...found.map((cell) => cell.total));
    const lineShown = usable < 1.9 * most;
    const scale = niceScale((Math.max(most, lineShown ? usable : 0) * 1.04) / 2 ** 30);
    const [left, top, bottom] = [narrow ? 30 : 44, 44, narrow ? 64 : 48];
    const height = narrow ? 346 : 380;
    const y = (n) => height - bottom - (n / 2 ** 30 / scale.most) * (height - top - bottom);
    const pitch = (width - left) / contexts.length;
    const wide = Math.min(pitch * 0.62, 72);
    const preset = presets[now.preset].label;
    const drawing = picture(
      width,
      height,
      `Memory of ${preset} on ${devices[now.device].label} by context, usable ${bytes(usable)}. ${contexts
        .map((n, i) => `${count(n)} tokens ${bytes(found[i].total)}, ${fitWords(found[i])}`)
        .join("; ")}.`,
    );
    const column = left + now.context * pitch;
    drawing.append(
      svg("rect", { x: column, y: top - 36, width: pitch, height: height - top + 36, rx: 8, class: "now-box" }),
    );
    for (let value = 0; value <= scale.most + 1e-9; value += scale.step) {
      const at = y(value * 2 ** 30);
      drawing.append(
        line(left, at, width, at, value ? "grid" : "axis"),
        text(left - 8, at + 4, `${value}`, { class: "small soft", "text-anchor": "end" }),
      );
    }
    drawing.append(text(0, 12, "GiB", { class: "small soft" }));
    found.forEach((cell, i) => {
      const x = left + i * pitch + (pitch - wide) / 2;
      let from = 0;
      PARTS.forEach(([key, label], part) => {
        const [low, high] = [y(from), y(from + cell.parts[part])];
        from += cell.parts[part];
        const bar = svg("rect", {
          x,
          y: high,
          width: wide,
          height: Math.max(low - high, 0.5),
          fill: key === "weights" ? "var(--weights)" : `url(#hatch-${key})`,
          class: low - high > 4 ? "segment" : "",
        });
        bar.append(svg("title", {}, `${label} ${bytes(cell.parts[part])}`));
        drawing.append(bar);
      });
    });
    if (lineShown) {
      const place = [left, y(usable), width, y(usable)];
      drawing.append(line(...place, "halo"), line(...place, "usable"));
    }
    found.forEach((cell, i) => {
      const middle = left + (i + 0.5) * pitch;
      const strong = i === now.context ? "strong" : "";
      const head = y(cell.total);
      drawing.append(
        text(middle, head - 7, gib(cell.total), { class: `small over ${strong}`, "text-anchor": "middle" }),
        text(middle, height - bottom + 19, narrow ? short(contexts[i]) : count(contexts[i]), {
          class: strong,
          "text-anchor": "middle",
        }),
        ...columnWords(cell, narrow).map((words, lineNumber) =>
          text(middle, height - bottom + 37 + 16 * lineNumber, words, {
            class: `small ${cell.fits ? "soft" : "strong"}`,
            "text-anchor": "middle",
          }),
        ),
      );
    });
    const usableWords = `usable ${bytes(usable)}${lineShown ? "" : ", above this chart"}`;
    const wordsAt = width - widthOf(usableWords, "bold 12px") - 6;
    drawing.append(
      text(width, 12, usableWords, { class: "small strong", "text-anchor": "end" }),
      lineShown ? line(wordsAt - 26, 8, wordsAt, 8, "usable") : text(wordsAt - 12, 12, "↑"),
    );
    const details = figures(
      ["Context", ...PARTS.map(([, label]) => label), "Total", "Fits"],
      contexts.map((n, i) => [
        count(n),
        ...found[i].parts.map(bytes),
        bytes(found[i].total),
        fitWords(found[i]),
      ]),
    );
    show(box, drawing, details);
    const legend = html("ul", { class: "legend across" });
    legend.append(
      ...PARTS.map(([key, label]) => html("li", {}, swatch(key), label)),
    );
    box.insertBefore(legend, details);
    byId("contexts-about").textContent =
      `${preset} on ${devices[now.device].label}, whole, by tokens of the context.` +
      (found[0].splits
        ? " Where it goes over the usable memory, the -ngl that fits stands under the column."
        : "");
  }

  function columnWords(cell, narrow) {
    if (cell.fits) return [cell.close ? "close" : "fits"];
    if (!cell.layers) return ["no"];
    return narrow ? ["-ngl", `${cell.layers}`] : [`-ngl ${cell.layers}`];
  }

  function niceScale(most) {
    const rough = most / 5;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough);
    return { step, most: Math.ceil(most / step) * step };
  }

  /* The result */

  const ICONS = {
    whole: "M9 16.5l5 5 9-10.5",
    part: "M16 8.5v9.5M16 23.4v.2",
    none: "M10.5 10.5l11 11M21.5 10.5l-11 11",
  };

  function drawVerdict(cell) {
    const d = devices[now.device];
    const kind = state(cell);
    const look = cell.fits && cell.close ? "part" : kind;
    byId("verdict-box").className = `verdict ${look}`;
    byId("verdict-icon").replaceChildren(
      svg("circle", { cx: 16, cy: 16, r: 15, class: "disc" }),
      svg("path", { d: ICONS[look], class: "mark" }),
    );
    byId("verdict").textContent = verdictWords(cell);
    byId("verdict-detail").textContent = detailWords(cell, d);
    byId("verdict-better").textContent = betterWords();
    const context = contexts[now.context];
    const beyond = context > data.trained_context;
    byId("context-note").hidden = !beyond;
    byId("context-note").textContent = beyond
      ? `SOLAR 10.7B itself was trained for ${count(data.trained_context)} tokens. ` +
        `At ${count(context)} this holds for an up-scaled Mistral 7B, whose configuration allows ` +
        `${count(contexts.at(-1))}.`
      : "";
    const preset = presets[now.preset];
    const engine = preset.engine ? ` Speed is that of ${preset.engine}; transformers itself is slower.` : "";
    const kernel = preset.notes[d.backend] ? ` ${preset.notes[d.backend]}` : "";
    byId("runtime-note").hidden = cell.splits;
    byId("runtime-note").textContent = cell.splits
      ? ""
      : `${preset.label} runs under ${preset.runtime}, not llama.cpp: memory is counted while it reads ` +
        `a prompt as long as the context.${d.backend === "CUDA" ? engine : ""}${kernel}`;
    const mac = d.backend === "Metal" && (!cell.fits || cell.close);
    byId("limit-note").hidden = !mac;
    byId("limit-note").textContent = mac
      ? "macOS lets the GPU use a part of the memory; sudo sysctl iogpu.wired_limit_mb=N raises " +
        "that limit until the next start."
      : "";
  }

  function drawSpeeds(cell) {
    const kinds = [
      ["tg", "Generation"],
      ["pp", "Prompt of 512 tokens"],
    ];
    const context = count(contexts[now.context]);
    const blocks = kinds.map(([key, label]) => {
      const block = html("div", { class: "speed", id: `speed-${key}` });
      block.append(html("div", { class: "kind" }, label));
      if (!cell.empty || cell.empty[key] === null) {
        const why = cell.empty ? "Too little is published of this runtime." : cell.why;
        const sentence = why.charAt(0).toUpperCase() + why.slice(1);
        block.append(html("p", { class: "none" }, `Not predicted. ${sentence}`));
        return block;
      }
      const at = (speed) => [speed[key], speed[`${key}Low`], speed[`${key}High`]];
      const [value, low, high] = at(cell.empty);
      const [value2, low2, high2] = at(cell.full);
      block.append(
        html("div", { class: "rate" }, rate(value), html("small", {}, " tok/s")),
        html("p", {}, html("strong", {}, span(low, high)), ", cache empty"),
        rangePicture(value, low, high, high, true),
        html(
          "p",
          {},
          html("strong", {}, `${rate(value2)} (${span(low2, high2)})`),
          ` after ${context} tokens`,
        ),
        rangePicture(value2, low2, high2, high, false),
      );
      return block;
    });
    if (cell.empty && !cell.fits) {
      blocks.push(
        html(
          "p",
          { class: "about across" },
          "With layers on the CPU the interval is wide: it depends on that CPU and its memory.",
        ),
      );
    }
    byId("speeds").replaceChildren(...blocks);
  }

  /** A bar with the whisker of its interval; `most` is what the full width stands for. */
  function rangePicture(value, low, high, most, first) {
    const x = (n) => `${(n / most) * 99}%`;
    const whisker = (name) => svg("line", { x1: x(low), y1: 7, x2: x(high), y2: 7, class: name });
    const end = (at) => svg("line", { x1: x(at), y1: 2, x2: x(at), y2: 12, class: "whisker" });
    return svg(
      "svg",
      { class: "range", height: 14, "aria-hidden": "true" },
      svg("rect", { y: 1, width: "100%", height: 12, rx: 3, class: "track" }),
      svg("rect", { y: 1, width: x(value), height: 12, rx: 3, class: first ? "bar now" : "bar" }),
      whisker("halo"),
      whisker("whisker"),
      end(low),
      end(high),
    );
  }

  function command() {
    const d = devices[now.device];
    const preset = presets[now.preset];
    const size = d.sizes > 1 ? ` --memory ${d.gb}` : "";
    return (
      `dus-edge bench predict ${data.model} --quant ${preset.key} ` +
      `--device ${d.id}${size} --ctx ${contexts[now.context]}`
    );
  }

  /* The table of all devices */

  const COLUMNS = [
    { key: "label", label: "Device", value: (row) => row.label, first: true },
    { key: "usable", label: "Usable, GiB", value: (row) => row.cell.usable, wide: true },
    { key: "fit", label: "Fits", value: (row) => row.cell.layers + row.cell.spare / 2 ** 50 },
    { key: "tg", label: "Generation, tok/s", value: (row) => row.cell.empty?.tg ?? -1 },
    { key: "full", label: "Cache full", value: (row) => row.cell.full?.tg ?? -1, wide: true },
    { key: "pp", label: "Prompt, tok/s", value: (row) => row.cell.empty?.pp ?? -1, wide: true },
  ];
  const byName = new Intl.Collator("en", { numeric: true }).compare;

  function compareRows(a, b) {
    const { value } = COLUMNS.find((column) => column.key === order.key);
    const [left, right] = [value(a), value(b)];
    const difference = typeof left === "string" ? byName(left, right) : left - right;
    return (order.up ? difference : -difference) || byName(a.label, b.label);
  }

  function drawHead() {
    byId("table-head").replaceChildren(
      ...COLUMNS.map((column) => {
        const button = html("button", { type: "button" }, column.label);
        button.addEventListener("click", () => {
          order.up = order.key === column.key ? !order.up : column.first === true;
          order.key = column.key;
          markOrder();
          drawTable();
        });
        return html(
          "th",
          { scope: "col", class: column.wide ? "wide" : null, "data-key": column.key },
          button,
        );
      }),
    );
    markOrder();
  }

  function markOrder() {
    for (const th of byId("table-head").children) {
      if (th.dataset.key === order.key) {
        th.setAttribute("aria-sort", order.up ? "ascending" : "descending");
      } else {
        th.removeAttribute("aria-sort");
      }
    }
  }

  function rateCell(speed, key, wide) {
    const td = html("td", { class: wide ? "wide" : null });
    if (!speed || speed[key] === null) {
      td.append("–");
    } else {
      const interval = span(speed[`${key}Low`], speed[`${key}High`]);
      td.append(rate(speed[key]), html("span", { class: "interval" }, interval));
    }
    return td;
  }

  function drawTable() {
    const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wholeOnly = byId("whole-only").checked;
    const rows = devices
      .map((d, index) => ({ d, index, label: d.label, cell: lookUp(index, now.preset, now.context) }))
      .filter(({ d, cell }) => {
        const searched = `${d.label} ${d.id} ${families[d.family]}`.toLowerCase();
        return (cell.fits || !wholeOnly) && words.every((word) => searched.includes(word));
      })
      .sort(compareRows);
    byId("table-body").replaceChildren(
      ...rows.map(({ d, index, cell }) => {
        const name = d.label.replace(/ GB$/, "\u00a0GB");
        const link = html("a", { href: hashOf({ ...now, device: index }) }, name);
        link.addEventListener("click", () => goToResult());
        return html(
          "tr",
          { class: index === now.device ? "now" : null, "data-device": `${d.id}@${d.gb}` },
          html("th", { scope: "row" }, link),
          html("td", { class: "wide" }, gib(cell.usable)),
          html(
            "td",
            {},
            html("span", { class: `fit ${state(cell)}` }, fitShort(cell)),
            html("span", { class: "interval" }, fitMore(cell)),
          ),
          rateCell(cell.empty, "tg", false),
          rateCell(cell.full, "tg", true),
          rateCell(cell.empty, "pp", true),
        );
      }),
      ...(rows.length
        ? []
        : [html("tr", {}, html("td", { class: "empty", colspan: COLUMNS.length }, "No such device."))]),
    );
    byId("count").textContent = `${rows.length} of ${devices.length}`;
    byId("table-about").textContent =
      `${presets[now.preset].label} at ${count(contexts[now.context])} tokens of context: ` +
      `${bytes(lookUp(0, now.preset, now.context).total)} with CUDA, ` +
      `${bytes(lookUp(firstMac, now.preset, now.context).total)} on a Mac. ` +
      `Small figures are 80 % intervals; "cache full" is generation after ${count(contexts[now.context])} tokens.`;
  }

  const firstMac = Math.max(0, devices.findIndex((d) => d.backend === "Metal"));

  function goToResult() {
    // After the hash has changed and the page with it.
    setTimeout(() => {
      byId("verdict").focus({ preventScroll: true });
      const calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
      byId("app").scrollIntoView({ behavior: calm ? "auto" : "smooth" });
    });
  }

  /* State: controls and hash */

  function hashOf(state) {
    const d = devices[state.device];
    const memorySize = d.sizes > 1 ? `&memory=${d.gb}` : "";
    const compare = state.compare === "family" ? "" : `&compare=${state.compare}`;
    return `#device=${d.id}${memorySize}&preset=${presets[state.preset].key}&context=${contexts[state.context]}${compare}`;
  }

  /** Takes over what the hash names and knows; what it lacks is the default. */
  function readHash() {
    const wanted = new URLSearchParams(location.hash.slice(1));
    const { device, memory: gb, preset, context } = data.first;
    const id = wanted.get("device") ?? device;
    const size = Number(wanted.get("memory") ?? (wanted.has("device") ? Number.NaN : gb));
    const exact = devices.findIndex((d) => d.id === id && d.gb === size);
    const any = devices.findIndex((d) => d.id === id);
    const fallback = devices.findIndex((d) => d.id === device && d.gb === gb);
    now.device = [exact, any, fallback].find((i) => i >= 0) ?? 0;
    const presetAt = presets.findIndex((p) => p.key === (wanted.get("preset") ?? preset));
    const contextAt = contexts.indexOf(Number(wanted.get("context") ?? context));
    now.preset = presetAt >= 0 ? presetAt : presets.findIndex((p) => p.key === preset);
    now.context = contextAt >= 0 ? contextAt : contexts.indexOf(context);
    const compare = wanted.get("compare");
    now.compare = Object.hasOwn(COMPARISONS, compare) ? compare : "family";
    byId("device").value = now.device;
    byId("preset").value = now.preset;
    byId("context").value = now.context;
    byId("compare").value = now.compare;
  }

  function writeHash() {
    try {
      history.replaceState(null, "", hashOf(now));
    } catch {
      // Browsers limit how often a page may do this; the next change writes it again.
    }
  }

  function fillPickers() {
    const groups = new Map();
    devices.forEach((d, i) => {
      if (!groups.has(d.family)) {
        groups.set(d.family, html("optgroup", { label: families[d.family] }));
      }
      groups.get(d.family).append(html("option", { value: i }, d.label));
    });
    byId("device").append(...groups.values());
    const runtimes = new Map();
    presets.forEach((p, i) => {
      if (!runtimes.has(p.runtime)) {
        runtimes.set(p.runtime, html("optgroup", { label: `For ${p.runtime}` }));
      }
      runtimes.get(p.runtime).append(html("option", { value: i }, `${p.label}, ${bytes(p.bytes)}`));
    });
    byId("preset").append(...runtimes.values());
    byId("context").max = contexts.length - 1;
    byId("context-ticks").append(...contexts.map((n) => html("span", {}, short(n))));
    byId("compare").append(
      ...Object.entries(COMPARISONS).map(([key, [label]]) => html("option", { value: key }, label)),
    );
  }

  function drawCharts() {
    drawMemoryBar(lookUp(now.device, now.preset, now.context));
    drawPresets();
    drawDevices();
    drawContexts();
  }

  /** All widths at once, and only when they change: each reading lays out the page anew. */
  function measure() {
    for (const box of document.querySelectorAll(".chart")) {
      widths[box.id] = Math.max(box.clientWidth, 240);
    }
  }

  function draw() {
    const cell = lookUp(now.device, now.preset, now.context);
    const context = `${count(contexts[now.context])} tokens`;
    byId("context-value").textContent = context;
    byId("context").setAttribute("aria-valuetext", context);
    [...byId("context-ticks").children].forEach((tick, i) => {
      tick.className = i === now.context ? "now" : "";
    });
    drawVerdict(cell);
    drawSpeeds(cell);
    drawCharts();
    drawTable();
    // Lines break before an option, never within one.
    const parts = command().split(/ (?=--)/);
    byId("command").replaceChildren(
      ...parts.flatMap((part) => [html("span", { class: "option" }, part), " "]),
    );
    byId("copied").textContent = "";
    byId("copy").textContent = "Copy";
  }

  async function copyCommand() {
    let done = true;
    try {
      await navigator.clipboard.writeText(command());
    } catch {
      const range = document.createRange();
      range.selectNodeContents(byId("command"));
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      done = document.execCommand("copy");
    }
    byId("copy").textContent = done ? "Copied" : "Selected";
    byId("copied").textContent = done ? "The command is copied." : "The command is selected.";
  }

  function listen() {
    for (const key of ["device", "preset", "context", "compare"]) {
      byId(key).addEventListener("input", ({ target }) => {
        now[key] = key === "compare" ? target.value : Number(target.value);
        writeHash();
        draw();
      });
    }
    byId("pickers").addEventListener("submit", (event) => event.preventDefault());
    byId("filter").addEventListener("input", drawTable);
    byId("whole-only").addEventListener("change", drawTable);
    byId("copy").addEventListener("click", copyCommand);
    byId("skip").addEventListener("click", (event) => {
      event.preventDefault(); // the address keeps the choice
      byId("verdict").focus();
    });
    addEventListener("hashchange", () => {
      readHash();
      draw();
    });
    let drawnAt = byId("app").clientWidth;
    new ResizeObserver(() => {
      const width = byId("app").clientWidth;
      if (width === drawnAt) return;
      drawnAt = width;
      measure();
      drawCharts();
    }).observe(byId("app"));
  }

  byId("app").hidden = false;
  fillPickers();
  drawHead();
  readHash();
  measure();
  listen();
  draw();
})();
