"""The stages of a build: one plain function each. Rows own policy; what a format needs stands in its backend."""
