"""Serving a system over HTTP with an API like OpenAI's, or as an MCP server."""
