// How the previews of cross-references behave: in the text only, never in the way of following a link.
(() => {
  const reference = ".bd-article a.reference.internal";

  tippy.setDefaultProps({
    touch: false, // a tap follows the link
    aria: { content: null, expanded: false }, // the link says where it leads; read aloud, a theorem would bury it
    appendTo: () => document.querySelector(".bd-article"),
    onShow: ({ reference: link }) => link.matches(reference) && !link.closest("[data-tippy-root]") ? undefined : false,
  });

  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") tippy.hideAll();
  });
})();
