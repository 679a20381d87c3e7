"""Reviews: who approved an adapter for use, by which policy and for what reasons."""
