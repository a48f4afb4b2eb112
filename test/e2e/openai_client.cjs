// One chat completion with the official Node package: request on the standard input, reply on the
// standard output, both as JSON. NODE_PATH says where the package is.
const OpenAI = require("openai");

async function main() {
  const { url, body } = JSON.parse(require("fs").readFileSync(0, "utf8"));
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
  let completion;
  if (body.stream) {
    // The package puts the pieces together; content is counted as it comes.
    const stream = client.chat.completions.stream(body);
    let pieces = 0;
    stream.on("content", () => (pieces += 1));
    completion = await stream.finalChatCompletion();
    completion.pieces = pieces;
  } else {
    completion = await client.chat.completions.create(body);
  }
  const choice = completion.choices[0];
  console.log(
    JSON.stringify({
      content: choice.message.content,
      tool_calls: choice.message.tool_calls ?? [],
      finish_reason: choice.finish_reason,
      prompt_tokens: completion.usage.prompt_tokens,
      cached_tokens: completion.usage.prompt_tokens_details.cached_tokens,
      pieces: completion.pieces ?? 1,
    })
  );
}

main().catch((error) => {
  console.error(error);
  process.exit(1);
});
