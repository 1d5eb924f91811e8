"""Texts to train on: files of users, SNLI and XSUM."""
