const tip=document.getElementById('tip');
for(const svg of document.querySelectorAll('svg.chart')){
  const d=JSON.parse(svg.dataset.chart);
  svg.addEventListener('pointermove',e=>{
    const box=svg.getBoundingClientRect(),x=(e.clientX-box.left)*svg.viewBox.baseVal.width/box.width;
    const at=(x-d.area[0])/d.area[1];let near=null;
    for(const s of d.series)for(const p of s.points)if(near===null||Math.abs(p[0]-at)<Math.abs(near-at))near=p[0];
    const lines=['step '+near];
    for(const s of d.series){
      const p=s.points.reduce((a,b)=>Math.abs(b[0]-near)<Math.abs(a[0]-near)?b:a);
      lines.push(s.label+': '+(+p[1].toPrecision(4))+d.unit);
    }
    tip.textContent=lines.join('\n');tip.style.display='block';
    tip.style.left=Math.min(e.clientX+14,innerWidth-tip.offsetWidth-6)+'px';tip.style.top=e.clientY+14+'px';
  });
  svg.addEventListener('pointerleave',()=>tip.style.display='none');
}
