// window.pageFaults({sizes, desktop}): what a reader of this page cannot see or read, as a list of sentences.
// A box may be wider than the column only where a reader expects to scroll: tables and equations.
(() => {
  const SCROLLS = "table, mjx-container, div.math, span.math";
  const article = () => document.querySelector(".bd-article") || document.body;
  const name = (element) => element.tagName.toLowerCase() + [...element.classList].slice(0, 3).map((c) => "." + c).join("");
  const words = (text) => JSON.stringify(text.trim().replace(/\s+/g, " ").slice(0, 50));

  // ---- colours
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  canvas.canvas.width = canvas.canvas.height = 1;
  const known = new Map();
  function rgba(text) {  // any CSS colour as [r, g, b, a], through a canvas, which knows them all
    if (!known.has(text)) {
      canvas.clearRect(0, 0, 1, 1);
      canvas.fillStyle = text;
      canvas.fillRect(0, 0, 1, 1);
      const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
      known.set(text, [r, g, b, a / 255]);
    }
    return known.get(text);
  }
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  let grounds = new Map(), shares = new Map();  // forgotten before each look at the page
  function ground(element) {  // the colour behind an element: backgrounds of its ancestors, laid over one another
    if (!element) return [255, 255, 255, 1];
    if (!grounds.has(element)) {
      const colour = rgba(getComputedStyle(element).backgroundColor);
      grounds.set(element, colour[3] === 1 ? colour : over(colour, ground(element.parentElement)));
    }
    return grounds.get(element);
  }
  function faded(element) {  // its opacity, times that of its ancestors
    if (!element) return 1;
    if (!shares.has(element)) shares.set(element, getComputedStyle(element).opacity * faded(element.parentElement));
    return shares.get(element);
  }
  const linear = (c) => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  function contrast(element, colour) {
    const behind = ground(element), [r, g, b, a] = rgba(colour);
    const [x, y] = [light(behind), light(over([r, g, b, a * faded(element)], behind))].sort((p, q) => q - p);
    return (x + 0.05) / (y + 0.05);
  }
  const shown = (element) => element.checkVisibility({ visibilityProperty: true }) && element.getClientRects().length > 0;

  function* texts() {  // [element, its colour, its words] for every text, form field and equation that is shown
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      const element = walk.currentNode.parentElement;
      if (!walk.currentNode.data.trim() || element.closest("script, style, noscript, mjx-assistive-mml, option")) continue;
      if (!shown(element)) continue;
      const style = getComputedStyle(element);
      yield [element, element.ownerSVGElement ? style.fill : style.color, walk.currentNode.data];
    }
    for (const field of document.querySelectorAll("select, input:not([type=range], [type=checkbox])")) {
      if (shown(field)) yield [field, getComputedStyle(field).color, field.value || field.placeholder || field.name];
    }
    for (const formula of document.querySelectorAll("mjx-container")) {
      if (shown(formula)) yield [formula, getComputedStyle(formula).color, formula.textContent || "equation"];
    }
  }

  function unreadable() {
    const found = new Map();
    for (const [element, colour, text] of texts()) {
      const ratio = contrast(element, colour);
      if (ratio < 4.5) {
        const key = `${name(element)} in ${name(element.parentElement)}`;
        if (!found.has(key)) found.set(key, `contrast ${ratio.toFixed(2)} of ${words(text)} (${key}: ${colour} on rgb(${ground(element).slice(0, 3).map(Math.round)}))`);
      }
    }
    return [...found.values()];
  }

  // ---- sizes
  function* boxes(top) {  // every element that takes room; of a drawing only its texts, of a formula only its frame
    const inside = "mjx-container *, .visually-hidden, script, style, [hidden]";
    for (const element of top.querySelectorAll(":not(svg *):not(mjx-container *), svg text")) {
      if (element.matches(inside) || !shown(element)) continue;
      if (!element.textContent.trim() && !element.matches("img, svg, input, select, canvas, video, iframe, mjx-container, div")) continue;
      yield element;
    }
  }
  function wide(desktop) {
    const column = article().getBoundingClientRect(), found = [];
    const left = Math.max(0, column.left) - 1;
    // A cell that is tagged full-width may use the margin, too; the window is its column.
    const right = (element) => element.closest(".tag_full-width") ? innerWidth : Math.min(innerWidth, column.right) + 1;
    if (document.documentElement.scrollWidth > innerWidth + 1) found.push("the page itself scrolls sideways");
    const told = new Set();
    for (const element of boxes(article())) {
      if (told.has(element.parentElement)) { told.add(element); continue; }  // one fault for a whole tree
      const scroller = element.parentElement.closest(SCROLLS);
      if (scroller && article().contains(scroller) && scrolls(scroller)) continue;
      const box = element.getBoundingClientRect();
      if (box.width === 0 || box.height === 0) continue;
      if (box.left < left || box.right > right(element)) {
        found.push(`${name(element)} in ${name(element.parentElement)} reaches from ${Math.round(box.left - column.left)} to ${Math.round(box.right - column.left)} of ${Math.round(column.width)} px: ${words(element.textContent)}`);
        told.add(element);
      } else if (element.clientWidth && element.scrollWidth > element.clientWidth + 2 && getComputedStyle(element).overflowX !== "visible" && !element.matches(SCROLLS)) {
        found.push(`${name(element)} cuts ${element.scrollWidth - element.clientWidth} px of its content: ${words(element.textContent)}`);
        told.add(element);
      }
    }
    for (const caption of article().querySelectorAll("caption, figcaption")) {
      const box = caption.getBoundingClientRect();
      if (box.width && (box.left < left || box.right > right(caption))) found.push(`a caption is cut: ${words(caption.textContent)}`);
    }
    for (const number of article().querySelectorAll("div.math .eqno")) {
      const box = number.getBoundingClientRect();
      for (const formula of number.parentElement.querySelectorAll("mjx-container")) {
        const part = visible(formula);
        if (part && part.right > box.left + 1 && part.left < box.right && part.bottom > box.top && part.top < box.bottom) {
          found.push(`equation ${number.textContent.trim()} lies behind its number`);
        }
      }
    }
    if (desktop) {
      for (const formula of article().querySelectorAll("div.math, mjx-container[display]")) {
        if (formula.scrollWidth > formula.clientWidth + 1) found.push(`an equation is ${formula.scrollWidth - formula.clientWidth} px wider than its column: ${words(formula.closest("div.math")?.textContent || "")}`);
      }
    }
    return found;
  }
  const scrolls = (element) => ["auto", "scroll"].includes(getComputedStyle(element).overflowX);
  function visible(formula) {  // what is seen of an equation: its drawing, within the box that scrolls it
    const drawing = formula.querySelector("svg")?.getBoundingClientRect(), box = formula.getBoundingClientRect();
    if (!drawing) return null;
    if (!scrolls(formula)) return drawing;
    return { left: Math.max(drawing.left, box.left), right: Math.min(drawing.right, box.right), top: drawing.top, bottom: drawing.bottom };
  }

  window.pageFaults = ({ sizes, desktop }) => {
    const still = document.createElement("style");
    still.textContent = "*, ::before, ::after { transition: none !important; animation: none !important; }";
    document.head.append(still);
    for (const details of document.querySelectorAll("details")) details.open = true;
    grounds = new Map();
    shares = new Map();
    for (const folded of document.querySelectorAll(".toggle-hidden")) folded.classList.remove("toggle-hidden");
    return [...unreadable(), ...(sizes ? wide(desktop) : [])];
  };
})();
