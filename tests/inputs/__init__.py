"""What people bring and type: what they see of it, before anything long has begun."""
