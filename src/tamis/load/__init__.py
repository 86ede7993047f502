"""Load on any server of OpenAI's API, and what its clients saw of it; imports no engine."""
