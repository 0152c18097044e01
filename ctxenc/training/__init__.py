"""What the commands of ctxenc run: fine-tuning, evaluation, prediction, export and inspection."""
