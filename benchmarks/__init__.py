"""Speed, precision and few-step quality, measured; `README.md` tells how to run and read it."""
