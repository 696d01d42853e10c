"""Wishes made true."""
