// One chat completion with the official Node package: request on the standard input, reply on the
// standard output, both as JSON. NODE_PATH says where the package is.
const OpenAI = require("openai");

async function main() {
  const { url, body } = JSON.parse(require("fs").readFileSync(0, "utf8"));
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  const made = await client.chat.completions.create(body);
  let texts = [];
  let calls = [];
  let finish = null;
  let usage = null;
  if (body.stream) {
    for await (const chunk of made) {
      usage = chunk.usage ?? usage;
      for (const choice of chunk.choices) {
        if (choice.delta.content) texts.push(choice.delta.content);
        finish = choice.finish_reason ?? finish;
      }
    }
  } else {
    const choice = made.choices[0];
    texts = [choice.message.content];
    calls = choice.message.tool_calls ?? [];
    finish = choice.finish_reason;
    usage = made.usage;
  }
  console.log(
    JSON.stringify({
      content: texts.every((text) => text === null) ? null : texts.join(""),
      tool_calls: calls,
      finish_reason: finish,
      prompt_tokens: usage.prompt_tokens,
      cached_tokens: usage.prompt_tokens_details.cached_tokens,
      pieces: texts.length,
    })
  );
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
