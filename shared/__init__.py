"""What both stages know: data, prompts, targets, the cache, the loss, recipes.  Imports no stage."""
