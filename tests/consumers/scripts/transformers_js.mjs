// Transformers.js in Node: a pipeline over the release folder. Only this file's folder is outside of the environment, so the
// library is looked for from the folder that the command runs in.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import { pathToFileURL } from "node:url";

const require = createRequire(join(process.cwd(), "package.json"));
const { env, pipeline } = await import(pathToFileURL(require.resolve("@huggingface/transformers")));

const request = JSON.parse(readFileSync(0, "utf8"));
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.useFSCache = false;
env.localModelPath = dirname(request.release);
const pipe = await pipeline(request.task, basename(request.release), { dtype: request.dtype, device: "cpu" });
const answers = [];
let output;
for (const texts of request.batches) {
  if (request.task === "feature-extraction") {
    output = "sentence_embedding";
    const tensor = await pipe(texts, { pooling: "mean", normalize: true });
    answers.push({ shape: tensor.dims, values: Array.from(tensor.data) });
  } else {
    output = "scores";
    const labels = Object.values(pipe.model.config.id2label);
    const found = (await pipe(texts, { top_k: null })).map((scores) =>
      labels.map((label) => scores.find((score) => score.label === label).score),
    );
    answers.push({ shape: [found.length, labels.length], values: found.flat() });
  }
}
console.log(JSON.stringify({ output, answers }));
