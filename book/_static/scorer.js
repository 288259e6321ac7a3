// How the search page orders its results. A reader who asks for "Table 7" of the paper wants the section of that name;
// Sphinx ranks each page that has the two words in any headings as high. The other numbers are Sphinx's own.
var Scorer = {
  score: ([document, title, anchor, description, score]) => {
    const asked = (new URLSearchParams(window.location.search).get("q") || "").trim().toLowerCase();
    const section = title.split(" > ").pop().trim().toLowerCase();
    return section === asked ? score + 100 : score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
