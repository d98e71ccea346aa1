"""Engine `openai`: a server elsewhere that speaks OpenAI's API, as one replica (SPEC chapter 14)."""
