"""The commands of `wan-finetune`: each module adds its own to the parser and runs them."""
