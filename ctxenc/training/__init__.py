"""Hold what the commands run: training, evaluation, prediction, export, pictures and inspection."""
