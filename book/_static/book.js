// What is wider than its place scrolls inside itself; only then does it need to be reached by the keyboard.
(() => {
  const selector = [
    ".katex-display", ".bd-article pre", ".drawing", ".ldyn-evidence", ".ldyn-scroll",
    ".pst-scrollable-table-container", ".cell_output .text_html",
  ].join(", ");
  const names = [[".katex-display", "wide formula"], ["pre", "code"], [".drawing", "figure"]];

  const update = (element) => {
    const overflows = element.scrollWidth > element.clientWidth + 1;
    if (overflows && !element.hasAttribute("tabindex")) {
      const name = names.find(([kind]) => element.matches(kind));
      element.setAttribute("tabindex", "0");
      element.setAttribute("role", "group");
      element.setAttribute("aria-label", `${name ? name[1] : "table"}, scrolls sideways`);
    } else if (!overflows && element.getAttribute("role") === "group") {
      for (const attribute of ["tabindex", "role", "aria-label"]) element.removeAttribute(attribute);
    }
  };

  document.addEventListener("DOMContentLoaded", () => {
    const elements = document.querySelectorAll(selector);
    const observer = new ResizeObserver((entries) => entries.forEach((entry) => update(entry.target)));
    elements.forEach((element) => observer.observe(element));
    // a font that arrives changes what is inside, and not the box that is observed
    document.fonts.addEventListener("loadingdone", () => elements.forEach(update));
    document.addEventListener("toggle", (event) => {
      event.target.querySelectorAll?.(selector).forEach(update);
    }, true);
  });
})();
