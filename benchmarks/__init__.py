"""What densreg measures of itself; each module is a command, run from the checkout."""
