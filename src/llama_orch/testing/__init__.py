"""What tests are made of: a loop in virtual time, and builders of small valid things."""
