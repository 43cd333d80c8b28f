"""A client of any server with OpenAI's API, for the terminal chat and the load generator; knows no engine of ours."""
