"""What people own: the Django project and its apps."""
