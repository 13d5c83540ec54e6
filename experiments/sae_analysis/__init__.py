"""What the versions of the comprehensive analysis share."""
