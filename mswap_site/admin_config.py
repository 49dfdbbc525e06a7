from django.contrib.admin.apps import AdminConfig


class StaffAdminConfig(AdminConfig):
    """Django's admin, with the start page of ``admin_site.py``."""

    default_site = "mswap_site.admin_site.StaffSite"
