"""A system that others call: over HTTP like OpenAI's, or as an MCP server."""
