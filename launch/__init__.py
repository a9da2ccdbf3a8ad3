"""Reference training programs built on commkit, for the quick start and the recipes."""
