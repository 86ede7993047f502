"""The OpenAI-compatible server: `tamis serve`."""
