// A link to a term of the glossary shows its definition: pointed at, with the focus, or tapped once. A second tap, or
// Enter, follows the link. Escape, or a tap elsewhere, closes the box; the pointer may move into it.
document.addEventListener("DOMContentLoaded", () => {
  const terms = CONSTANTS;
  const box = document.createElement("div");
  box.id = "term-definition";
  box.setAttribute("role", "tooltip");
  box.hidden = true;
  document.body.append(box);
  let shown = null, timer = 0, touched = false;

  function close() {
    clearTimeout(timer);
    shown?.removeAttribute("aria-describedby");
    shown = null;
    box.hidden = true;
  }

  function closeSoon() {
    clearTimeout(timer);
    timer = setTimeout(close, 200);
  }

  function show(link, [term, text]) {
    clearTimeout(timer);
    if (shown === link) return;
    close();
    shown = link;
    const name = document.createElement("strong");
    name.textContent = term;
    box.replaceChildren(name, " " + text);
    link.setAttribute("aria-describedby", box.id);
    box.hidden = false;
    // Below the link, or above it where there is no room; never beyond the edge of the window.
    const at = link.getClientRects()[0], size = box.getBoundingClientRect();
    const width = document.documentElement.clientWidth, height = document.documentElement.clientHeight;
    const left = Math.max(8, Math.min(at.left, width - size.width - 8));
    const top = at.bottom + 6 + size.height > height && at.top > size.height + 6 ? at.top - size.height - 6 : at.bottom + 6;
    box.style.left = `${left + window.scrollX}px`;
    box.style.top = `${top + window.scrollY}px`;
  }

  for (const link of document.querySelectorAll(".bd-article a[href*='#term-']")) {
    const entry = terms[link.hash.slice("#term-".length).toLowerCase()];
    if (!entry || link.classList.contains("headerlink")) continue;
    link.classList.add("glossary-term");
    link.removeAttribute("title");
    link.addEventListener("pointerdown", event => { touched = event.pointerType === "touch"; });
    link.addEventListener("pointerenter", event => { if (event.pointerType !== "touch") show(link, entry); });
    link.addEventListener("pointerleave", event => { if (event.pointerType !== "touch") closeSoon(); });
    link.addEventListener("focus", () => { if (!touched) show(link, entry); });
    link.addEventListener("blur", closeSoon);
    link.addEventListener("click", event => {
      if (touched && shown !== link) {
        event.preventDefault();
        show(link, entry);
      }
      touched = false;
    });
  }
  box.addEventListener("pointerenter", () => clearTimeout(timer));
  box.addEventListener("pointerleave", closeSoon);
  document.addEventListener("keydown", event => { if (event.key === "Escape") close(); });
  document.addEventListener("pointerdown", event => {
    if (shown && !box.contains(event.target) && !shown.contains(event.target)) close();
  });
});
