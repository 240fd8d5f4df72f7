// Markdown to DOM nodes, for text that grows while it is read and that nobody vouches for: each of its characters
// ends in a text node, and of its addresses only those of the web become links.
//
// A text is {t, m}, two strings of one length: the characters, and for each of them "1" if its token was drafted,
// else "0". Whatever cuts the one cuts the other, so the marks arrive where the characters do.

const FENCE = /^(\s*)(`{3,}|~{3,})\s*([\w+#.-]{0,30})[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const DASHES = /^\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?$/; // the line below the head of a table
const DEEPEST = 12; // blocks within blocks: a line of a thousand ">" is text from there on

// What has no end is searched for one in the next 2000 characters only, so that no text takes quadratic time.
const INLINE = new RegExp(
  [
    /\\(?<escaped>[!-/:-@[-`{-~])/,
    /(?<!`)(?<ticks>`+)(?!`) ?(?<code>[^]{1,2000}?) ?(?<!`)\k<ticks>(?!`)/,
    /!?\[(?<label>(?:[^[\]]|\[[^[\]]{0,200}\]){0,500})\]\((?<to>[^\s()]*(?:\([^\s()]*\)[^\s()]*)*)(?:\s+"[^"]{0,500}")?\)/,
    /\*\*(?=\S)(?<strong>[^]{0,2000}?\S)\*\*(?!\*)/,
    /(?<!\w)__(?=\S)(?<strong_>[^]{0,2000}?\S)__(?!\w)/,
    /\*(?=[^\s*])(?<em>[^]{0,2000}?[^\s*])\*(?!\*)/,
    /(?<![\w_])_(?=[^\s_])(?<em_>[^]{0,2000}?[^\s_])_(?![\w_])/,
    /~~(?=\S)(?<del>[^]{0,2000}?\S)~~/,
    /(?<url>https?:\/\/[^\s<>"'`|]*[^\s<>"'`|.,;:!?)*_\]}])/,
  ].map((rule) => rule.source).join("|"),
  "gd",
);

export const element = (tag, properties, ...children) => {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
};
const cut = ({ t, m }, from, to) => ({ t: t.slice(from, to), m: m.slice(from, to) });
const trim = (s) => cut(s, s.t.search(/\S|$/), s.t.trimEnd().length);
const join = (lines) => ({ t: lines.map(({ t }) => t).join("\n"), m: lines.map(({ m }) => m).join("0") });
const depthOf = ({ t }) => /^\s*/.exec(t)[0].replaceAll("\t", "    ").length;

/** Make `parent` show a text. What did not change since the last time stays, with its focus and its selection. */
export function render(parent, t, m) {
  let at = 0;
  const lines = t.split("\n").map((line) => ({ t: line, m: m.slice(at, (at += line.length + 1) - 1) }));
  fill(parent, lines, 0);
}

function fill(parent, lines, deep) {
  let count = 0;
  for (const [part, build] of deep > DEEPEST ? [[lines, () => paragraph(lines)]] : blocks(lines, deep)) {
    const { t, m } = join(part);
    const old = parent.children[count++];
    if (old?.source === `${t}\n${m}`) continue;
    const made = Object.assign(build(), { source: `${t}\n${m}` });
    if (old) old.replaceWith(made);
    else parent.append(made);
  }
  while (parent.children.length > count) parent.lastElementChild.remove();
  return parent;
}

/** The blocks of lines, one after the other: [its lines, what makes its element]. */
function* blocks(lines, deep) {
  for (let i = 0; i < lines.length; ) {
    const from = i;
    const line = lines[i++];
    const taken = () => lines.slice(from, i);
    let found;
    if (!line.t.trim()) continue;
    if ((found = FENCE.exec(line.t))) {
      const [, indent, fence, language] = found;
      const ends = (text) => text.startsWith(fence) && !text.replaceAll(fence[0], "");
      while (i < lines.length && !ends(lines[i].t.trim())) i++;
      const body = lines.slice(from + 1, i++).map((l) => cut(l, Math.min(indent.length, l.t.search(/\S|$/))));
      yield [taken(), () => code(body, language)];
    } else if ((found = HEADING.exec(line.t))) {
      const [all, { length: level }] = found;
      const text = cut(line, all.length, line.t.replace(/\s#+\s*$/, "").length);
      yield [taken(), () => inline(element(`h${Math.min(level + 2, 6)}`), text)]; // the page has h1 and h2
    } else if (RULE.test(line.t)) {
      yield [taken(), () => element("hr")];
    } else if (QUOTE.test(line.t)) {
      while (i < lines.length && QUOTE.test(lines[i].t)) i++;
      const inner = taken().map((l) => cut(l, QUOTE.exec(l.t)[0].length));
      yield [taken(), () => fill(element("blockquote"), inner, deep + 1)];
    } else if (ITEM.test(line.t)) {
      while (i < lines.length && inList(lines, i, line)) i++;
      yield [taken(), () => list(lines.slice(from, i), deep)];
    } else if (isTable(lines, from)) {
      while (i < lines.length && lines[i].t.includes("|")) i++;
      yield [taken(), () => table(lines.slice(from, i))];
    } else {
      while (i < lines.length && lines[i].t.trim() && !interrupts(lines, i)) i++;
      yield [taken(), () => paragraph(lines.slice(from, i))];
    }
  }
}

const isTable = (lines, i) =>
  [i, i + 1].every((k) => lines[k]?.t.includes("|")) && DASHES.test(lines[i + 1].t.trim());

const interrupts = (lines, i) =>
  [FENCE, HEADING, RULE, QUOTE, /^\s*([-*+]|1[.)])\s+\S/].some((rule) => rule.test(lines[i].t)) || isTable(lines, i);

const isItem = (line, first) =>
  ITEM.test(line.t) && !RULE.test(line.t) && depthOf(line) < depthOf(first) + 2
  && /^\s*\d/.test(line.t) === /^\s*\d/.test(first.t);

/** Does line `i` go on with the list whose first line is `first`? */
function inList(lines, i, first) {
  const inside = (line) => isItem(line, first) || depthOf(line) >= depthOf(first) + 2;
  const goesOn = () => lines[i - 1].t.trim() && !interrupts(lines, i) && !ITEM.test(lines[i].t); // the line before it
  if (lines[i].t.trim()) return inside(lines[i]) || goesOn();
  while (i < lines.length && !lines[i].t.trim()) i++;
  return i < lines.length && inside(lines[i]);
}

function list(lines, deep) {
  const number = parseInt(lines[0].t.trim(), 10);
  const items = [];
  for (const line of lines) {
    if (isItem(line, lines[0])) items.push([cut(line, ITEM.exec(line.t)[0].length)]);
    else items.at(-1).push(line);
  }
  const item = ([first, ...rest]) => {
    const indent = Math.min(...rest.filter(({ t }) => t.trim()).map(({ t }) => t.search(/\S/)));
    return fill(element("li"), [first, ...rest.map((l) => cut(l, Math.min(indent, l.t.length)))], deep + 1);
  };
  return element(number >= 0 ? "ol" : "ul", number >= 0 ? { start: number } : {}, ...items.map(item));
}

function table([head, dashes, ...rows]) {
  const cells = (line) => {
    const { t } = trim(line);
    const inner = cut(trim(line), t.startsWith("|") ? 1 : 0, t.length - (/[^\\]\|$/.test(t) ? 1 : 0));
    const ends = [...inner.t.matchAll(/\\.|\|/g)].filter(([bar]) => bar === "|").map(({ index }) => index);
    return [...ends, inner.t.length].map((end, k) => trim(cut(inner, k ? ends[k - 1] + 1 : 0, end)));
  };
  const sides = cells(dashes).map(({ t }) => (t.endsWith(":") ? (t.startsWith(":") ? "center" : "right") : ""));
  const row = (tag) => (line) =>
    element("tr", {}, ...cells(line).slice(0, sides.length).map((cell, k) => {
      const made = inline(element(tag, tag === "th" ? { scope: "col" } : {}), cell);
      made.style.textAlign = sides[k];
      return made;
    }));
  return element("div", { className: "wide" },
    element("table", {}, element("thead", {}, row("th")(head)), element("tbody", {}, ...rows.map(row("td")))));
}

function code(lines, language) {
  const text = join(lines);
  const copy = element("button", { type: "button", textContent: "Copy", ariaLabel: "Copy code" });
  copy.dataset.copy = text.t; // the page has one listener for all of these
  return element("figure", { className: "code" },
    element("figcaption", {}, element("span", { textContent: language }), copy),
    element("pre", {}, put(element("code"), text)));
}

const paragraph = (lines) => inline(element("p"), trim(join(lines.map(trim))));

function inline(parent, s) {
  let from = 0;
  for (const match of s.t.matchAll(INLINE)) {
    const { groups, indices, index } = match;
    const kind = Object.keys(groups).find((name) => groups[name] !== undefined);
    const inner = (name) => cut(s, ...indices.groups[name]);
    const whole = cut(s, index, index + match[0].length);
    const address = kind === "label" ? groups.to : groups.url;
    put(parent, cut(s, from, index));
    from = index + match[0].length;
    if (kind === "escaped") put(parent, inner(kind));
    else if (kind === "ticks") parent.append(put(element("code"), inner("code")));
    else if (kind !== "label" && kind !== "url") parent.append(inline(element(kind.replace("_", "")), inner(kind)));
    else if (!/^https?:\/\//i.test(address) || !URL.canParse(address)) put(parent, whole);
    else {
      const link = element("a", { href: address, rel: "noopener noreferrer", target: "_blank" });
      parent.append(kind === "label" ? inline(link, inner(kind)) : put(link, whole));
    }
  }
  return put(parent, cut(s, from));
}

/** Text nodes for a text; drafted runs of it in spans of their own, without the space before them. */
function put(parent, { t, m }) {
  for (const { 0: run, index } of m.matchAll(/0+|1+/g)) {
    const text = t.slice(index, index + run.length);
    const begin = run[0] === "1" ? text.search(/\S|$/) : text.length;
    parent.append(text.slice(0, begin));
    if (begin < text.length) parent.append(element("span", { className: "drafted", textContent: text.slice(begin) }));
  }
  return parent;
}
