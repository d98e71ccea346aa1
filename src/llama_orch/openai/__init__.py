"""OpenAI's API in words of ours and back: requests to tasks, frames to answers, errors to its shape. Pure; `api/openai`
does the serving."""
