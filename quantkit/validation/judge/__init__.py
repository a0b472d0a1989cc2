"""How two models' answers are compared, and what is concluded."""
