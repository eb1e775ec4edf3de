// Typesets formulas for maths.py: each line in is {latex, options}, each line out {html} or {error}.
// It ends when its input ends, so it cannot outlive the build that started it.
const katex = require(process.argv[2]);

const answer = (line) => {
  try {
    const { latex, options } = JSON.parse(line);
    return { html: katex.renderToString(latex, options) };
  } catch (error) {
    return { error: error.message };
  }
};

require("node:readline")
  .createInterface({ input: process.stdin })
  .on("line", (line) => process.stdout.write(JSON.stringify(answer(line)) + "\n"));
