"""A finished run as a web service, with a page."""

from pgp.serve.app import build_app as build_app
from pgp.serve.app import serve as serve
from pgp.serve.limits import Limits as Limits
