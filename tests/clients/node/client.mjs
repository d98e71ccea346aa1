// OpenAI's client for Node: what it is asked to do comes as an argument, what it saw goes to stdout as JSON.
import OpenAI from "openai";

const [url, token, act] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: token, timeout: 60_000, maxRetries: 10 });
const asked = {
  model: "default",
  messages: [{ role: "user", content: "Tell me a story about a brave fox." }],
  max_tokens: 8,
  seed: 7,
};

const acts = {
  async list() {
    const names = [];
    for await (const model of client.models.list()) names.push(model.id);
    return names;
  },
  async chat() {
    const answer = await client.chat.completions.create(asked);
    return { text: answer.choices[0].message.content, tokens: answer.usage.completion_tokens };
  },
  async stream() {
    let text = "";
    let tokens = null;
    const stream = await client.chat.completions.create({
      ...asked,
      stream: true,
      stream_options: { include_usage: true },
    });
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? "";
      tokens = chunk.usage?.completion_tokens ?? tokens;
    }
    return { text, tokens };
  },
  async tools() {
    const place = { type: "string", maxLength: 8 };
    const parameters = { type: "object", properties: { place }, required: ["place"] };
    const tools = [{ type: "function", function: { name: "look", parameters } }];
    const calling = { ...asked, model: "tools", tools, parallel_tool_calls: false, max_tokens: 200 };
    const answer = await client.chat.completions.create({ ...calling, tool_choice: "required" });
    const { message, finish_reason: reason } = answer.choices[0];
    const [call] = message.tool_calls;
    const stream = await client.chat.completions.create({ ...calling, tool_choice: "required", stream: true });
    let streamed = "";
    for await (const chunk of stream) {
      streamed += chunk.choices[0]?.delta?.tool_calls?.[0]?.function?.arguments ?? "";
    }
    const result = { role: "tool", tool_call_id: call.id, content: "fog" };
    const after = await client.chat.completions.create({
      ...calling,
      messages: [...asked.messages, message, result],
      max_tokens: 8,
    });
    const { name, arguments: given } = call.function;
    return { name, reason, arguments: given, streamed, after: after.usage.completion_tokens };
  },
  async leave() {
    const stream = await client.chat.completions.create({ ...asked, model: "full", max_tokens: 1500, stream: true });
    for await (const chunk of stream) break;
    return "left";
  },
  async full() {
    const answer = await client.chat.completions.create({ ...asked, model: "full" });
    return answer.usage.completion_tokens;
  },
  async vectors() {
    const answer = await client.embeddings.create({ model: "embedder", input: ["a red fox", "an old dog"] });
    return answer.data.map((one) => one.embedding.length);
  },
  async refused() {
    try {
      await client.chat.completions.create({ ...asked, n: 2 });
    } catch (error) {
      return { kind: error.constructor.name, status: error.status, param: error.param, code: error.code };
    }
    return null;
  },
};

console.log(JSON.stringify(await acts[act]()));
