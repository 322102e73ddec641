"""The live page: what the router knows at this moment, as JSON and as a page that draws it."""
