"""What the tests share, and the benches and docs/accuracy.md with them."""
