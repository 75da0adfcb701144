"""Languages by ISO 639: one code for each, whoever names it.

A language is called by its two letters (639-1) where it has them, else by three (639-3). Varieties that libraries and data name one way
here and another there count as the language that both belong to: Cantonese and Wu as zh, Egyptian Arabic as ar, Sorani as ku.
"""

import re

_TWO_LETTERS = """
aar:aa abk:ab ave:ae afr:af aka:ak amh:am arg:an ara:ar asm:as ava:av aym:ay aze:az bak:ba bel:be bul:bg bis:bi bam:bm ben:bn bod:bo bre:br
bos:bs cat:ca che:ce cha:ch cos:co cre:cr ces:cs chu:cu chv:cv cym:cy dan:da deu:de div:dv dzo:dz ewe:ee ell:el eng:en epo:eo spa:es est:et
eus:eu fas:fa ful:ff fin:fi fij:fj fao:fo fra:fr fry:fy gle:ga gla:gd glg:gl grn:gn guj:gu glv:gv hau:ha heb:he hin:hi hmo:ho hrv:hr hat:ht
hun:hu hye:hy her:hz ina:ia ind:id ile:ie ibo:ig iii:ii ipk:ik ido:io isl:is ita:it iku:iu jpn:ja jav:jv kat:ka kon:kg kik:ki kua:kj kaz:kk
kal:kl khm:km kan:kn kor:ko kau:kr kas:ks kur:ku kom:kv cor:kw kir:ky lat:la ltz:lb lug:lg lim:li lin:ln lao:lo lit:lt lub:lu lav:lv mlg:mg
mah:mh mri:mi mkd:mk mal:ml mon:mn mar:mr msa:ms mlt:mt mya:my nau:na nob:nb nde:nd nep:ne ndo:ng nld:nl nno:nn nor:no nbl:nr nav:nv nya:ny
oci:oc oji:oj orm:om ori:or oss:os pan:pa pli:pi pol:pl pus:ps por:pt que:qu roh:rm run:rn ron:ro rus:ru kin:rw san:sa srd:sc snd:sd sme:se
sag:sg hbs:sh sin:si slk:sk slv:sl smo:sm sna:sn som:so sqi:sq srp:sr ssw:ss sot:st sun:su swe:sv swa:sw tam:ta tel:te tgk:tg tha:th tir:ti
tuk:tk tgl:tl tsn:tn ton:to tur:tr tso:ts tat:tt twi:tw tah:ty uig:ug ukr:uk urd:ur uzb:uz ven:ve vie:vi vol:vo wln:wa wol:wo xho:xh yid:yi
yor:yo zha:za zho:zh zul:zu
"""
_VARIETIES = """
cmn:zh yue:zh wuu:zh arb:ar arz:ar ary:ar ckb:ku sdh:ku kmr:ku azb:az azj:az uzn:uz uzs:uz gug:gn pnb:pa swh:sw lvs:lv ekk:et prs:fa pes:fa
zsm:ms khk:mn ydd:yi plt:mg npi:ne ory:or gaz:om fuv:ff nb:no nob:no fil:tl quz:qu als:sq ayr:ay
"""
CODES: dict[str, str] = dict(pair.split(":") for pair in (_TWO_LETTERS + _VARIETIES).split())
"""ISO 639-3, and codes of varieties, to the code used here."""
UNSPACED = ("zh", "ja", "th", "lo", "km", "my", "bo", "dz")
"""Languages written without spaces between words, where a character counts as a word and rules on words do not hold."""
PATTERN = r"^[a-z]{2,3}$"


def language_code(code: str) -> str:
    """The code used here for an ISO 639-1 or 639-3 code, in lower case; a subtag (``zh-Hant``, ``en_US``) is dropped."""
    code = re.split("[-_]", code.lower())[0]
    return CODES.get(code, code)
