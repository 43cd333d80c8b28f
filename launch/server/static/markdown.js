// Renders Markdown as elements, safely: text becomes text nodes, and only links to http, https and mailto are links.
//
// Blocks: headings, fenced code, lists (nested), quotes, tables, rules, paragraphs. Inline: code, bold, italic, strike,
// links. No raw HTML and no images: both are shown as they were written.

import { copyButton, element } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MAX_DEPTH = 8;

/** Show `text` in `parent`. Blocks that are the same as the last time keep their elements, as in a growing answer. */
export function renderMarkdown(parent, text) {
  const blocks = split(text.replaceAll("\r\n", "\n").split("\n"));
  const before = parent.markdownBlocks ?? [];
  let same = 0;
  while (same < blocks.length && same < before.length && blocks[same].source === before[same]) same += 1;
  while (parent.childNodes.length > same) parent.lastChild.remove();
  for (const block of blocks.slice(same)) parent.append(render(block, 0));
  parent.markdownBlocks = blocks.map((block) => block.source);
}

// -- blocks -----------------------------------------------------------------------------------------------------

function split(lines) {
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [kind, end] = extent(lines, at);
    const own = lines.slice(at, end);
    blocks.push({ kind, lines: own, source: `${kind}\n${own.join("\n")}` });
    at = end;
  }
  return blocks;
}

/** The kind of the block that begins at a line, and where it ends. */
function extent(lines, at) {
  const fence = FENCE.exec(lines[at]);
  if (fence) {
    const closing = new RegExp(`^ {0,3}${fence[1][0]}{${fence[1].length},}\\s*$`);
    let end = at + 1;
    while (end < lines.length && !closing.test(lines[end])) end += 1;
    return ["code", Math.min(end + 1, lines.length)];
  }
  if (HEADING.test(lines[at])) return ["heading", at + 1];
  if (RULE.test(lines[at])) return ["rule", at + 1];
  if (QUOTE.test(lines[at])) return ["quote", until(lines, at, (line) => !QUOTE.test(line))];
  if (ITEM.test(lines[at])) return ["list", endOfList(lines, at)];
  if (lines[at].includes("|") && TABLE_RULE.test(lines[at + 1] ?? "")) {
    return ["table", until(lines, at, (line) => !line.includes("|"))];
  }
  return ["paragraph", until(lines, at + 1, (line) => !line.trim() || interrupts(line))];
}

function until(lines, at, ends) {
  while (at < lines.length && !ends(lines[at])) at += 1;
  return at;
}

const interrupts = (line) =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);

function endOfList(lines, at) {
  let end = at + 1;
  while (end < lines.length) {
    const line = lines[end];
    // A blank line ends it unless the list goes on behind it.
    if (!line.trim()) {
      const next = lines[end + 1] ?? "";
      if (!ITEM.test(next) && !/^\s{2,}\S/.test(next)) break;
    } else if (!ITEM.test(line) && !/^\s/.test(line) && interrupts(line)) break;
    end += 1;
  }
  return end;
}

function render({ kind, lines }, depth) {
  switch (kind) {
    case "code":
      return renderCode(lines);
    case "heading": {
      const [, marks, text] = HEADING.exec(lines[0]);
      // The page has its own h1 and h2.
      return inline(element(`h${Math.min(6, marks.length + 2)}`), text);
    }
    case "rule":
      return element("hr");
    case "quote":
      return renderNested(element("blockquote"), lines.map((line) => QUOTE.exec(line)[1]), depth);
    case "list":
      return renderList(lines, depth);
    case "table":
      return renderTable(lines);
    default:
      return inline(element("p"), lines.map((line) => line.trimStart()).join("\n"));
  }
}

function renderNested(parent, lines, depth) {
  if (depth >= MAX_DEPTH) parent.append(lines.join("\n"));
  else parent.append(...split(lines).map((block) => render(block, depth + 1)));
  return parent;
}

function renderCode(lines) {
  const [, marks, language] = FENCE.exec(lines[0]);
  const isClosed = lines.length > 1 && new RegExp(`^ {0,3}${marks[0]}{${marks.length},}\\s*$`).test(lines.at(-1));
  const source = lines.slice(1, isClosed ? -1 : undefined).join("\n");
  const head = element("div", { className: "code-head" }, element("span", {}, language || "text"), copyButton(() => source));
  return element("div", { className: "code" }, head, element("pre", { tabIndex: 0 }, element("code", {}, source)));
}

function renderList(lines, depth) {
  const [, indent, marker] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(marker);
  const list = element(ordered ? "ol" : "ul", ordered ? { start: parseInt(marker, 10) } : {});
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push([item[3]]);
    else items.at(-1).push(line.replace(new RegExp(`^\\s{0,${indent.length + (ordered ? 3 : 2)}}`), ""));
  }
  for (const item of items) {
    const made = element("li");
    const first = until(item, 1, (line) => !line.trim() || interrupts(line));
    inline(made, item.slice(0, first).join("\n"));
    list.append(renderNested(made, item.slice(first), depth));
  }
  return list;
}

function renderTable(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const row = (line, name) => element("tr", {}, ...cells(line).map((cell) => inline(element(name), cell)));
  const head = element("thead", {}, row(lines[0], "th"));
  const body = element("tbody", {}, ...lines.slice(2).map((line) => row(line, "td")));
  return element("div", { className: "scroll" }, element("table", {}, head, body));
}

// -- inline -----------------------------------------------------------------------------------------------------

const INLINE = new RegExp(
  [
    /(?<ticks>`+)(?<code>.+?)\k<ticks>(?!`)/.source,
    /\[(?<label>[^[\]]+)\]\((?<address>[^()\s]+)\)/.source,
    /(?<!\*)\*\*(?<bold>\S(?:.*?\S)?)\*\*/.source,
    /(?<![\w_])__(?<bold2>\S(?:.*?\S)?)__(?!\w)/.source,
    /(?<!\*)\*(?<italic>[^\s*](?:[^*]*[^\s*])?)\*(?!\*)/.source,
    /(?<![\w_])_(?<italic2>[^\s_](?:[^_]*[^\s_])?)_(?!\w)/.source,
    /~~(?<strike>\S(?:.*?\S)?)~~/.source,
    /\\(?<escaped>[\\`*_{}[\]()#+\-.!~|>])/.source,
  ].join("|"),
  "su",
);

function inline(parent, text, depth = 0) {
  let rest = text;
  while (rest) {
    const found = depth < MAX_DEPTH ? INLINE.exec(rest) : null;
    if (!found) {
      parent.append(rest);
      break;
    }
    if (found.index) parent.append(rest.slice(0, found.index));
    parent.append(inlineNode(found, depth + 1));
    rest = rest.slice(found.index + found[0].length);
  }
  return parent;
}

function inlineNode(found, depth) {
  const { code, label, address, bold, bold2, italic, italic2, strike, escaped } = found.groups;
  if (code !== undefined) return element("code", {}, code.replace(/^ (.+) $/s, "$1"));
  if (escaped !== undefined) return escaped;
  if (bold ?? bold2) return inline(element("strong"), bold ?? bold2, depth);
  if (italic ?? italic2) return inline(element("em"), italic ?? italic2, depth);
  if (strike) return inline(element("s"), strike, depth);
  if (!isSafe(address)) return found[0];
  const link = element("a", { href: address, rel: "noopener noreferrer nofollow", target: "_blank" });
  return inline(link, label, depth);
}

function isSafe(address) {
  // Absolute only: a relative address of a model's would lead into this server.
  return /^(https?:\/\/|mailto:)/i.test(address);
}
