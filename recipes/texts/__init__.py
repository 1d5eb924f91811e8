"""Texts to train on: files of users, our own pairs, SNLI and XSum."""
