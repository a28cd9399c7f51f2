"""A vision-language model: body and head, adapters, shards."""
