"""Behind the commands of ctxenc: fine-tuning, evaluation, prediction, export and inspection."""
