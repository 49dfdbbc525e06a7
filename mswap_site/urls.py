from allauth.account.decorators import secure_admin_login
from django.contrib import admin
from django.urls import include, path

from mswap_site import errors

# Staff sign in as everyone does: attempts are counted, and a second factor is asked for.
admin.site.login = secure_admin_login(admin.site.login)  # type: ignore[method-assign]

urlpatterns = [
    path("admin/", admin.site.urls),
    path("api/", include("mswap_site.api_urls")),
    path("accounts/", include("allauth.urls")),
    path("", include("mswap_site.page_urls")),
]
handler400 = errors.bad_request
handler403 = errors.forbidden
handler404 = errors.not_found
handler500 = errors.server_error
