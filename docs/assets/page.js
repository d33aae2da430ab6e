// Renders what pymdownx.arithmatex (generic: true) marks as a formula, and nothing else on the page.
(function () {
  const delimiters = [
    { left: "\\[", right: "\\]", display: true },
    { left: "\\(", right: "\\)", display: false },
  ];

  function render(page) {
    for (const formula of page.querySelectorAll(".arithmatex")) {
      renderMathInElement(formula, { delimiters, throwOnError: false });
    }
  }

  // The theme's document$ fires on every page, by instant navigation too.
  if (typeof document$ === "undefined") {
    document.addEventListener("DOMContentLoaded", () => render(document));
  } else {
    document$.subscribe(() => render(document));
  }
})();
