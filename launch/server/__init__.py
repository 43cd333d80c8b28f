"""The HTTP front end: OpenAI's routes over an AsyncLLM. It knows no scheduler, no worker and no tensor."""
