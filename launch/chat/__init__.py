"""The terminal chat, `python -m launch.chat`: between a person, or a pipe, and a server with OpenAI's API."""
