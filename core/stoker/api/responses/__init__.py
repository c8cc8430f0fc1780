"""``/v1/responses``: OpenAI's responses, translated into chat requests and told in their own words."""
